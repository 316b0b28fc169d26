"""The worlds of ranks that the other tests stand on: failures are reported and never hang."""

import os

import pytest
import torch
import torch.distributed as dist

from tests.ranks import RankError, Ranks, RankTimeout


def add(group, value):
    mine = torch.tensor([float(dist.get_rank(group) + value)])
    dist.all_reduce(mine, group=group)
    return dist.get_rank(group), os.getpid(), mine


def test_a_world_is_started_once(ranks):
    first, second = ranks(2).run(add, 10), ranks(2).run(add, 20)
    assert [(rank, total.item()) for rank, _, total in first] == [(0, 21), (1, 21)]
    assert [pid for _, pid, _ in first] == [pid for _, pid, _ in second]
    assert torch.equal(second[0][2], torch.tensor([41.0]))


def test_a_group_that_is_not_the_world(ranks):
    assert [total.item() for _, _, total in ranks(4).run(add, 0, ranks=(1, 3))] == [1, 1]


def odd_ranks_raise(group):
    if dist.get_rank(group) % 2:
        raise ValueError(f"rank {dist.get_rank(group)} has had enough")


def wait_for_nobody(group):
    if dist.get_rank(group) == 0:
        dist.recv(torch.zeros(1), 1, group=group)


def one_dies(group):
    if dist.get_rank(group) == 1:
        os._exit(3)
    return "alive"


def test_failures():
    world = Ranks(2)
    try:
        with pytest.raises(ValueError, match="rank 1 has had enough") as caught:
            world.run(odd_ranks_raise)
        assert isinstance(caught.value.__cause__, RankError)
        assert "in odd_ranks_raise" in str(caught.value.__cause__)
        with pytest.raises(RankTimeout, match=r"ranks \[0\] of 2 did not finish"):
            world.run(wait_for_nobody, timeout=1.0)
        with pytest.raises(RankError, match="rank 1 died with exit code 3"):
            world.run(one_dies)
        assert world.run(one_dies, dying=[1]) == ["alive", None]
        assert [total.item() for _, _, total in world.run(add, 0)] == [1, 1]
    finally:
        world.stop()
