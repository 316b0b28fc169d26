"""Which operator runs a feed-forward network of all experts, once a plan is made; and experts of given weights."""

from __future__ import annotations

import torch

from tutelx import ops
from tutelx.experts.base import Network
from tutelx.ops.activation import Activation
from tutelx.ops.expert_products import expert_products, groupable
from tutelx.types import DispatchMap, ExpertKernel, Layout, Plan


def run_network(
    rows: torch.Tensor,
    map: DispatchMap,
    weights: ops.ExpertWeights,
    plan: Plan,
    *,
    activation: Activation,
    zero_unused: bool = True,
    plain: bool = False,
) -> torch.Tensor:
    """rows [R, M] -> [R, M] by the kernel that the plan names; under autocast the weights are cast to rows' dtype.

    plain: expert by expert in plain torch, whose backward makes no gradient that nobody asked for.
    """
    weights = weights.to(rows.dtype)
    if plain:
        return expert_products(rows, map, weights, kernel="tiled", activation=activation, zero_unused=zero_unused)
    if plan.expert_kernel == "tiled" and rows.device.type == "cpu":
        return ops.expert_ffn(
            rows,
            map,
            weights,
            activation=activation,
            tile_rows=plan.tile_rows,
            tile_columns=plan.tile_columns,
            zero_unused=zero_unused,
        )
    return expert_products(
        rows, map, weights, kernel=plan.expert_kernel, activation=activation, zero_unused=zero_unused
    )


class StackedExperts:
    """Runs stacked weights that belong to somebody else's module, whatever their strides. Made anew on every call."""

    layouts: tuple[Layout, ...] = ("ragged", "padded")
    expert_kernels: tuple[ExpertKernel, ...] = ("tiled", "bmm")

    def __init__(self, weights: ops.ExpertWeights, activation: Activation, *, plain: bool = False) -> None:
        self.weights, self.activation, self.plain = weights, activation, plain

    @property
    def hidden_dim(self) -> int:
        return self.weights.up[0].shape[-2]

    @property
    def numbers(self) -> int:
        """Parameters of one expert."""
        return sum(weight[0].numel() for (weight,) in filter(None, self.weights.lists()))

    def network(self) -> Network | None:
        return None if self.plain else Network(self.weights, self.activation)

    def kernels_for(self, x: torch.Tensor) -> tuple[ExpertKernel, ...]:
        num_experts, hidden_dim, model_dim = self.weights.up[0].shape
        grouped = groupable(num_experts, model_dim, hidden_dim, x.dtype, x.device)
        return (*self.expert_kernels, "grouped") if grouped else self.expert_kernels

    def __call__(self, rows: torch.Tensor, map: DispatchMap, plan: Plan) -> torch.Tensor:
        """rows [R, M] -> [R, M]."""
        return run_network(rows, map, self.weights, plan, activation=self.activation, plain=self.plain)
