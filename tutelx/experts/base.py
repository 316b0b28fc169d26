"""What the layer asks of its experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from tutelx.ops import ExpertWeights
from tutelx.ops.activation import Activation
from tutelx.types import DispatchMap, ExpertKernel, Layout, Plan

if TYPE_CHECKING:
    from tutelx.comm.call import RankCall
    from tutelx.comm.placement import Placement


class Network(NamedTuple):
    """What `ops.expert_ffn` needs to run experts."""

    weights: ExpertWeights
    activation: Activation


class Experts(nn.Module):
    """E experts. `layouts` and `kernels_for` say which plans they can run."""

    layouts: tuple[Layout, ...] = ("ragged", "padded")
    expert_kernels: tuple[ExpertKernel, ...] = ("tiled",)
    hidden_dim: int = 0
    numbers: int = 0  # parameters of one expert, where they are known

    def kernels_for(self, x: torch.Tensor) -> tuple[ExpertKernel, ...]:
        """Those that can run rows of x's dtype on its device; `expert_kernels` can run any."""
        return self.expert_kernels

    def forward(self, rows: torch.Tensor, map: DispatchMap, plan: Plan) -> torch.Tensor:
        """rows [R, M] -> [R, M]."""
        raise NotImplementedError

    def across(self, rows: torch.Tensor, call: RankCall, plan: Plan) -> torch.Tensor:
        """Over many ranks, where this module holds this rank's experts: rows [R, M] in the call's order -> [R, M]."""
        from tutelx.comm.pipeline import run_modules

        parameters = [p for p in self.parameters() if p.requires_grad]
        return run_modules(call, rows, lambda arrived, map: self(arrived, map, plan), parameters, plan)

    def network(self) -> Network | None:
        """Where calling this module does no more than `ops.expert_ffn` with these weights; else None."""
        return None

    def shard_degrees(self, placement: Placement) -> tuple[int, ...]:
        """The degrees that can run; modules that nobody can cut or gather stay where they are."""
        return (1,)

    def describe(self) -> str:
        """What must be equal on all ranks, in at most 24 letters."""
        return type(self).__name__[:24]
