"""Megablocks: `MoE` and `dMoE`, of which the `experts` inside (`ParallelMLP`, `ParallelDroplessMLP`) run here.

The layer around it stays the library's: router with jitter and z-loss, shared expert, returned bias.
T tokens, M model dim, H hidden dim, E experts, K choices.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tutelx import ops
from tutelx.errors import InvalidValueError
from tutelx.experts.network import StackedExperts
from tutelx.hooks import intercepted
from tutelx.integrations.formula import find_activation
from tutelx.integrations.libraries.replacement import LibraryMoE
from tutelx.integrations.libraries.structure import check_containers, child, tokens
from tutelx.integrations.spec import Declined, LibrarySpec
from tutelx.types import Plan, Routing

NAME = "Megablocks"
_SAVE = "save_load_balancing_loss"


def is_candidate(layer: nn.Module) -> bool:
    mlp = child(layer, "mlp")
    return mlp is not None and {"w1", "w2"} <= set(mlp._parameters) and hasattr(layer, "expert_capacity")


def find_spec(layer: nn.Module) -> LibrarySpec:
    """Raises Declined for experts that are spread over ranks, weights of other shapes, and unknown activations."""
    mlp: Any = child(layer, "mlp")
    args: Any = layer.args
    if getattr(args, "moe_expert_model_parallelism", False):
        raise Declined("args.moe_expert_model_parallelism", "spreads the experts over ranks")
    E, M, H = int(args.moe_num_experts), int(args.hidden_size), int(args.ffn_hidden_size)
    names = ("w1", "v1", "w2") if "v1" in mlp._parameters else ("w1", "w2")
    if set(mlp._parameters) != set(names):
        raise Declined("mlp", f"holds the parameters {sorted(mlp._parameters)}, expected {sorted(names)}")
    dropless = mlp.w1.dim() == 2
    for name in names:
        shape = tuple(getattr(mlp, name).shape)
        expected = (E * H, M) if dropless else (E, M, H) if name == "w1" else (E, H, M)
        if shape != expected:
            raise Declined(f"mlp.{name}", f"has shape {shape}, expected {expected}")
    activation = find_activation(args.activation_fn, "args.activation_fn")
    if getattr(args, "moe_loss_weight", 0) > 0 and _SAVE not in _globals(layer):
        raise Declined("forward", f"saves a balancing loss, but there is no function {_SAVE} beside it")
    check_containers(layer, "mlp")
    hidden = f"{activation}(w1(x)) * v1(x)" if "v1" in names else f"{activation}(w1(x))"
    return LibrarySpec(
        library=NAME,
        model_dim=M,
        num_experts=E,
        network=f"w2({hidden})",
        activation=activation,
        top_k=int(args.moe_top_k),
    )


def _globals(layer: nn.Module) -> dict[str, Any]:
    return getattr(type(layer).forward, "__globals__", {})


class Layer(LibraryMoE):
    def examples(self, rows: int = 32) -> list[tuple]:
        w1 = self.mlp.w1
        found = []
        for seed in (0, 1):
            x = tokens((rows // 2, 2, self.model_dim), w1, seed=seed)
            scores_TE = tokens((rows, self.num_experts), w1, seed=seed + 2).softmax(dim=-1)
            if seed:
                scores_TE[::2] = scores_TE[:1]
            weights_TK, ids_TK = scores_TE.topk(self.spec.top_k, dim=-1)
            found.append((x, scores_TE, weights_TK, ids_TK))
        return found

    @contextmanager
    def observed(self) -> Iterator[list]:
        filed: list = []
        known = _globals(self.original)
        if _SAVE not in known:
            yield filed
            return
        before = known[_SAVE]
        known[_SAVE] = filed.append
        try:
            yield filed
        finally:
            known[_SAVE] = before

    def steps_aside(self, *args: Any, **named: Any) -> bool:
        return intercepted(self.mlp)

    def run(
        self,
        x: torch.Tensor,
        scores: torch.Tensor,
        expert_weights: torch.Tensor,
        top_experts: torch.Tensor,
        *,
        plan: Plan | None,
    ) -> Any:
        """x: [.., M]; scores: [T, E]; expert_weights, top_experts: [T, K]. Returns y, or y and the bias."""
        args: Any = self.args
        self._check_input(x)
        ids_TK = top_experts.reshape(-1, self.spec.top_k).int()
        weights_TK = expert_weights.reshape(ids_TK.shape)
        if weights_TK.dtype != torch.float64:
            weights_TK = weights_TK.float()
        counts_E = ids_TK.new_zeros(self.num_experts).scatter_add(
            0, ids_TK.flatten().long(), ids_TK.new_ones(ids_TK.numel())
        )
        routing = Routing(expert_ids=self._within_capacity(ids_TK), weights=weights_TK, requested=counts_E)
        y = self.run_routed(x, routing, self._stacked(), plan)
        if self.training and getattr(args, "moe_loss_weight", 0) > 0:
            _globals(self.original)[_SAVE]((counts_E, scores))
        if self.bias is None:
            return y
        return (y, self.bias) if args.return_bias else y + self.bias

    def _within_capacity(self, ids_TK: torch.Tensor) -> torch.Tensor:
        """`MoE` fills its experts token by token, choice after choice; `dMoE`, or capacity 0, drops nothing."""
        if self.mlp.w1.dim() == 2:
            return ids_TK
        capacity = self.original.expert_capacity(len(ids_TK))  # type: ignore[operator]
        if capacity < 0:
            raise InvalidValueError(f"args.moe_capacity_factor={self.args.moe_capacity_factor} is negative")
        if capacity == 0:
            return ids_TK
        map = ops.route(ids_TK.reshape(-1, 1), self.num_experts, capacity)
        return torch.where(map.dest.reshape(ids_TK.shape) >= 0, ids_TK, -1)

    def _stacked(self) -> StackedExperts:
        mlp = self.mlp
        E, M = self.num_experts, self.model_dim
        assert self.spec.activation is not None
        if mlp.w1.dim() == 3:
            first, down = mlp.w1.transpose(1, 2), mlp.w2.transpose(1, 2)
        else:
            first, down = mlp.w1.reshape(E, -1, M), mlp.w2.reshape(E, -1, M).transpose(1, 2)
        weights = ops.ExpertWeights(up=(first,), down=(down,))
        if "v1" in mlp._parameters:
            weights = ops.ExpertWeights(gate=(first,), up=(mlp.v1.reshape(E, -1, M),), down=(down,))
        return StackedExperts(weights, self.spec.activation, plain=self.plain)
