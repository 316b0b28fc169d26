"""The built-in experts: two-layer and gated feed-forward networks with stacked weights."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

from tutelx import ops
from tutelx.experts.base import Experts, Network
from tutelx.experts.network import run_network
from tutelx.hooks import intercepted
from tutelx.ops.activation import Activation, check_activation
from tutelx.ops.expert_products import groupable
from tutelx.types import DispatchMap, ExpertKernel, Plan

if TYPE_CHECKING:
    from tutelx.comm.call import RankCall
    from tutelx.comm.placement import Placement
    from tutelx.comm.ranks import Ranks
    from tutelx.comm.shards import Shard


class FeedForwardExperts(Experts):
    """down(act(gate(x)) * up(x)) if gated, else down(act(up(x))), with parameters [E, out, in].

    Initialised as E separate `nn.Linear` layers would be: uniform in +-1/sqrt(fan_in).

    Over many ranks a rank holds its share, plain tensors of the same names: its experts, and where experts are sliced
    its part of H, of down_bias its part of M. The numbers are those that one process would draw from the same seed.
    """

    expert_kernels: tuple[ExpertKernel, ...] = ("tiled", "bmm")

    gate_proj: nn.Parameter
    up_proj: nn.Parameter
    down_proj: nn.Parameter
    gate_bias: nn.Parameter
    up_bias: nn.Parameter
    down_bias: nn.Parameter

    def __init__(
        self,
        model_dim: int,
        hidden_dim: int,
        num_experts: int,
        *,
        gated: bool,
        activation: Activation = "silu",
        bias: bool = False,
        ranks: Ranks | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_activation(activation)
        self.model_dim, self.hidden_dim, self.num_experts = model_dim, hidden_dim, num_experts
        self.activation = activation
        self.gated = gated
        self._shards: dict[str, Shard] = {}
        self.numbers = 0

        def add(name: str, *shape: int, sliced: int) -> None:
            whole = (num_experts, *shape)
            self.numbers += math.prod(shape)
            if ranks is not None:
                self._shards[name] = ranks.shard(whole, sliced)
                whole = self._shards[name].local_shape
            self.register_parameter(name, nn.Parameter(torch.empty(whole, device=device, dtype=dtype)))

        if gated:
            add("gate_proj", hidden_dim, model_dim, sliced=1)
        add("up_proj", hidden_dim, model_dim, sliced=1)
        add("down_proj", model_dim, hidden_dim, sliced=2)
        self.has_bias = bias
        if bias:
            if gated:
                add("gate_bias", hidden_dim, sliced=1)
            add("up_bias", hidden_dim, sliced=1)
            add("down_bias", model_dim, sliced=1)
        self.reset_parameters()
        if ranks is not None:
            ranks.hold(self, self._shards)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        # Expert by expert, also those of other ranks: so the numbers are the same however many ranks there are.
        for name, parameter in self.named_parameters():
            bound = 1 / math.sqrt(self.hidden_dim if name.startswith("down") else self.model_dim)
            shard = self._shards.get(name)
            if shard is None:
                for expert in parameter:
                    nn.init.uniform_(expert, -bound, bound)
                continue
            own, *part = shard.index
            for e in range(self.num_experts):
                expert = nn.init.uniform_(parameter.new_empty(shard.shape[1:]), -bound, bound)
                if own.start <= e < own.stop:
                    parameter[e - own.start].copy_(expert[tuple(part)])

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
        return run_network(rows, map, self.weights(), plan, activation=self.activation)

    def network(self) -> Network | None:
        return None if self._shards or intercepted(self) else Network(self.weights(), self.activation)

    def across(self, rows: torch.Tensor, call: RankCall, plan: Plan) -> torch.Tensor:
        from tutelx.comm.pipeline import run_ffn

        weights = self.weights().to(rows.dtype)
        return run_ffn(call, rows, weights, hidden_dim=self.hidden_dim, activation=self.activation, plan=plan)

    def shard_degrees(self, placement: Placement) -> tuple[int, ...]:
        return placement.degrees()

    def describe(self) -> str:
        return f"{'gated' if self.gated else 'ffn'} {self.activation}{' bias' if self.has_bias else ''}"

    def extra_repr(self) -> str:
        return (
            f"{self.num_experts} experts, {self.model_dim} -> {self.hidden_dim} -> {self.model_dim},"
            f" gated={self.gated}, activation={self.activation}, bias={self.has_bias}"
        )
