"""Layers of other libraries, small, by name: the real packages where they are installed, and stand-ins."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.libraries import standins

M = 8


def ffn() -> nn.Module:
    return nn.Sequential(nn.Linear(M, 12), nn.ReLU(), nn.Linear(12, M))


class Normed(nn.Module):
    """An expert that no compiled network is."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(M), nn.Linear(M, 12), nn.Linear(12, M)

    def forward(self, x):
        return self.down(torch.tanh(self.up(self.norm(x))))


def package(name: str) -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, reason=f"{name.split('.')[0]} is not installed")


def st_moe(block=False, **changes):
    library = package("st_moe_pytorch")
    moe = library.MoE(dim=M, num_experts=4, **changes)
    return library.SparseMoEBlock(moe, add_ff_before=True) if block else moe


def mixture(**changes):
    return package("mixture_of_experts").MoE(dim=M, num_experts=4, hidden_dim=12, **changes)


def hierarchy(**changes):
    return package("mixture_of_experts").HeirarchicalMoE(dim=M, num_experts=(2, 3), hidden_dim=12, **changes)


def fairscale(make=ffn):
    library = package("fairscale.nn.moe")
    return library.MOELayer(library.Top2Gate(M, 4), nn.ModuleList(make() for _ in range(4)))


def torchscale(gate="Top2Gate", make=ffn, batch_size=None, **changes):
    """fairseq's layer as torchscale has it."""
    package("torchscale")
    moe_layer, routing = (
        importlib.import_module(f"torchscale.component.xmoe.{name}") for name in ("moe_layer", "routing")
    )
    experts = nn.ModuleList(make() for _ in range(4))
    args = SimpleNamespace(moe_expert_count=4, batch_size=batch_size, batch_size_valid=batch_size)
    return moe_layer.MOELayer(getattr(routing, gate)(M, 4, **changes), experts, args)


def deepspeed(make=ffn, **changes):
    """The real one: https://github.com/deepspeedai/DeepSpeed."""
    return package("deepspeed.moe.layer").MoE(M, make(), num_experts=4, **changes)


def standin(make=ffn, **changes):
    return standins.DeepSpeedMoE(M, make, 4, **changes)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "st-moe": st_moe,
    "st-moe in a block": lambda: st_moe(block=True),
    "st-moe top-3": lambda: st_moe(gating_top_n=3, straight_through_dispatch_tensor=False),
    "st-moe of other experts": lambda: st_moe(experts=nn.ModuleList(ffn() for _ in range(4))),
    "mixture": mixture,
    "mixture, all, gelu": lambda: mixture(second_policy_train="all", second_policy_eval="none", activation=nn.GELU),
    "hierarchy": hierarchy,
    "fairscale": fairscale,
    "fairscale, experts called": lambda: fairscale(Normed),
    "torchscale top-1": lambda: torchscale("Top1Gate"),
    "torchscale top-2": torchscale,
    "torchscale, random": lambda: torchscale(second_expert_policy="random", batch_prioritized_routing=True),
    "DeepSpeed stand-in top-1": standin,
    "DeepSpeed stand-in top-2": lambda: standin(k=2, residual=True),
    "DeepSpeed stand-in top-3": lambda: standin(k=3, drop_tokens=False),
    "DeepSpeed stand-in, dense": lambda: standin(k=2, routes=False),
    "DeepSpeed stand-in, experts called": lambda: standin(Normed, k=2),
    "DeepSpeed top-1": deepspeed,
    "DeepSpeed top-2": lambda: deepspeed(k=2, use_residual=True, capacity_factor=0.5),
    "DeepSpeed top-3": lambda: deepspeed(k=3, drop_tokens=False, noisy_gate_policy="Jitter"),
    "DeepSpeed top-1, noise": lambda: deepspeed(noisy_gate_policy="RSample", min_capacity=2),
    "Megablocks MoE stand-in": lambda: standins.Megablocks(dropless=False),
    "Megablocks MoE stand-in, no drop": lambda: standins.Megablocks(dropless=False, moe_capacity_factor=0, bias=False),
    "Megablocks dMoE stand-in": lambda: standins.Megablocks(dropless=True, return_bias=False, moe_loss_weight=0),
    "Megablocks dMoE stand-in, gated": lambda: standins.Megablocks(dropless=True, gated=True),
}


@pytest.fixture
def alone(monkeypatch):
    """A world of one rank, which fairscale and torchscale ask for; histograms of integers, which CPUs lack."""
    histc = torch.histc
    monkeypatch.setattr(torch, "histc", lambda x, **sizes: histc(x.float(), **sizes))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    for name in ("get_moe_group", "get_all2all_group"):
        try:
            function = getattr(importlib.import_module("torchscale.component.xmoe.global_groups"), name)
        except ImportError:
            continue
        vars(function).clear()
