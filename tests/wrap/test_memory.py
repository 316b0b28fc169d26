"""Wrapping makes no second set of weights, neither for good nor while it looks at a layer."""

from __future__ import annotations

import pytest
import torch

import tutelx
from tests import models
from tests.allocations import Allocations
from tests.libraries import standins


def written(name: str) -> torch.nn.Module:
    # 6 MiB of weights or more: beside them the few tokens of the probe are small.
    if name == "DeepSpeed stand-in":
        return standins.DeepSpeedMoE(128, lambda: models.FFN(128, 512), 16, k=2)
    if name in ("MoE", "Unnormalized"):
        return getattr(models, name)(128, 256, 16)
    library = pytest.importorskip(name, reason=f"{name} is not installed")
    return library.MoE(dim=128, num_experts=16)


@pytest.mark.parametrize("name", ["MoE", "Unnormalized", "DeepSpeed stand-in", "st_moe_pytorch", "mixture_of_experts"])
def test_no_second_set_of_weights(name):
    layer = written(name)
    with Allocations(layer) as allocations:
        wrapped = tutelx.wrap(layer, strict=True)
    assert allocations.held > 6e6
    assert allocations.most < 0.75 * allocations.held
    assert allocations.more < 1e-3 * allocations.held
    assert tutelx.unwrap(wrapped) is layer


def test_what_is_counted():
    layer = torch.nn.Linear(256, 256, bias=False)
    with Allocations(layer) as allocations:
        twin = layer.weight * 2
        assert allocations.more == allocations.held == 256 * 256 * 4
        view = twin.view(-1)
        assert allocations.more == allocations.held
        del twin, view
    assert allocations.more == 0
    assert allocations.most == allocations.held
