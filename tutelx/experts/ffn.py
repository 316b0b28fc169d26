"""The built-in experts: two-layer and gated feed-forward networks with stacked weights."""

from __future__ import annotations

import math

import torch
from torch import nn

from tutelx import ops
from tutelx.experts.base import Experts
from tutelx.ops.activation import Activation, check_activation
from tutelx.ops.expert_products import expert_products, groupable
from tutelx.types import DispatchMap, ExpertKernel, Plan


class FeedForwardExperts(Experts):
    """down(act(gate(x)) * up(x)) if gated, else down(act(up(x))), with parameters [E, out, in].

    Initialised as E separate `nn.Linear` layers would be: uniform in +-1/sqrt(fan_in).
    """

    expert_kernels: tuple[ExpertKernel, ...] = ("tiled", "bmm")

    def __init__(
        self,
        model_dim: int,
        hidden_dim: int,
        num_experts: int,
        *,
        gated: bool,
        activation: Activation = "silu",
        bias: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_activation(activation)
        self.model_dim, self.hidden_dim, self.num_experts = model_dim, hidden_dim, num_experts
        self.activation = activation
        self.gated = gated

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(num_experts, *shape, device=device, dtype=dtype))

        if gated:
            self.gate_proj = parameter(hidden_dim, model_dim)
        self.up_proj = parameter(hidden_dim, model_dim)
        self.down_proj = parameter(model_dim, hidden_dim)
        self.has_bias = bias
        if bias:
            if gated:
                self.gate_bias = parameter(hidden_dim)
            self.up_bias = parameter(hidden_dim)
            self.down_bias = parameter(model_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for name, parameter in self.named_parameters():
            fan_in = self.hidden_dim if name.startswith("down") else self.model_dim
            nn.init.uniform_(parameter, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))

    def weights(self) -> ops.ExpertWeights:
        biases = {}
        if self.has_bias:
            biases = {"up_bias": (self.up_bias,), "down_bias": (self.down_bias,)}
            if self.gated:
                biases["gate_bias"] = (self.gate_bias,)
        gate = (self.gate_proj,) if self.gated else ()
        return ops.ExpertWeights(gate=gate, up=(self.up_proj,), down=(self.down_proj,), **biases)

    def kernels_for(self, x: torch.Tensor) -> tuple[ExpertKernel, ...]:
        grouped = groupable(self.num_experts, self.model_dim, self.hidden_dim, x.dtype, x.device)
        return (*self.expert_kernels, "grouped") if grouped else self.expert_kernels

    def forward(self, rows: torch.Tensor, map: DispatchMap, plan: Plan) -> torch.Tensor:
        weights = self.weights().to(rows.dtype)
        if plan.expert_kernel == "tiled" and rows.device.type == "cpu":
            return ops.expert_ffn(
                rows,
                map,
                weights,
                activation=self.activation,
                tile_rows=plan.tile_rows,
                tile_columns=plan.tile_columns,
            )
        return expert_products(rows, map, weights, kernel=plan.expert_kernel, activation=self.activation)

    def extra_repr(self) -> str:
        return (
            f"{self.num_experts} experts, {self.model_dim} -> {self.hidden_dim} -> {self.model_dim},"
            f" gated={self.gated}, activation={self.activation}, bias={self.has_bias}"
        )
