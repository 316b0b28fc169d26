"""The machine as records see it."""

import torch
import torch.distributed as dist

from tests.tuner.machines import HARDWARE
from tutelx.tuner import machine as machines
from tutelx.tuner.machine import Machine


def test_one_process_has_no_links(monkeypatch):
    monkeypatch.setattr(machines, "here", lambda device: HARDWARE)
    found = Machine.here(torch.device("cpu"))
    assert found.hardware == HARDWARE
    assert {"tutelx", "torch", "python"} == set(found.software)
    assert found.throttling() is None


def links(group):
    machines.here = lambda device: HARDWARE
    return Machine.here(torch.device("cpu"), group).hardware, dist.get_world_size(group)


def test_ranks_share_the_links_that_they_measured(ranks):
    (one, _), (other, _) = ranks(4).run(links, ranks=(0, 1))
    assert one == other
    assert (one.intra_link, one.ranks_per_node) == ("tcp", 2)
    assert one.intra_rate > 0
