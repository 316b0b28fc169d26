"""What is put inside of compilers, wrappers and training loops: a small layer of every kind that tutelx runs."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

import tutelx
from tests import models
from tutelx import Capacity, MoE

M = 16


def listed(style: type[models.MoE] = models.MoE, **options) -> nn.Module:
    return tutelx.wrap(style(), strict=True, **options)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "MoE": lambda: MoE(M, 24, 4, gate=tutelx.gates.TopK(k=2, balance_coef=0.1)),
    "MoE, fixed capacity": lambda: MoE(M, 24, 4, capacity=Capacity.fixed(1.0)),
    "MoE of modules": lambda: MoE(M, 24, 4, experts=nn.ModuleList(models.FFN(M, 24) for _ in range(4))),
    "wrapped list": listed,
    "wrapped list that skips": lambda: listed(models.Unnormalized),
}


class Model(nn.Module):
    """Two blocks around one kind of layer, and a head."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.blocks = models.model(make(), make())
        self.head = nn.Linear(M, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(x))


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return LAYERS[name]()


def pair() -> tuple[nn.Module, nn.Module]:
    """A model of hand-written layers: wrapped, and as written."""
    torch.manual_seed(0)
    written = Model(models.MoE)
    return tutelx.wrap(copy.deepcopy(written), strict=True), written


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn((*shape, M), generator=torch.Generator().manual_seed(seed))


def gradients(layer: nn.Module, x: torch.Tensor, run: Callable | None = None) -> dict[str, torch.Tensor | None]:
    """The output (called "y"), and the gradients of a fixed sum of it in the input ("x") and in each parameter."""
    leaf = x.clone().requires_grad_()
    y = (layer if run is None else run)(leaf)
    weigh = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    total = (y.float() * weigh).sum() + getattr(layer, "aux_loss", 0.0)
    named = dict(layer.named_parameters())
    grads = torch.autograd.grad(total, [leaf, *named.values()], allow_unused=True)
    return {"y": y.detach(), **dict(zip(["x", *named], grads))}


def assert_same(given: dict, expected: dict, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    """A gradient that only one side leaves out counts as zero there: a graph knows no missing one."""
    assert given.keys() == expected.keys()
    for name, theirs in expected.items():
        ours = given[name]
        if theirs is None or ours is None:
            assert all(each is None or not each.any() for each in (ours, theirs)), name
            continue
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")
