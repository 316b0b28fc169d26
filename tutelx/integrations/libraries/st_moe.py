"""st-moe-pytorch: `MoE`, alone or inside `SparseMoEBlock`, which stays the library's.

The gate, `TopNGating`, decides with its capacity, thresholds and random draws as before, and gives GShard's dense
combine tensor. T tokens, M model dim, H hidden dim, E experts, K choices, R rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from tutelx import ops
from tutelx.experts import ListedExperts
from tutelx.experts.linked import LinkedExperts
from tutelx.hooks import intercepted
from tutelx.integrations.libraries.replacement import LibraryMoE, routing_of
from tutelx.integrations.libraries.structure import batches, check_alone, check_containers, child, formula_of
from tutelx.integrations.spec import Declined, LibrarySpec
from tutelx.ops.segments import each_segment
from tutelx.types import DispatchMap, ExpertKernel, Layout, Plan

NAME = "st-moe-pytorch"
_EXPERTS = "experts.experts"


def is_candidate(layer: nn.Module) -> bool:
    return isinstance(child(layer, _EXPERTS), nn.ModuleList) and child(layer, "gate.to_gates") is not None


def find_spec(layer: nn.Module) -> LibrarySpec:
    """Raises Declined for experts that are spread over ranks, and for a gate that mixes all experts."""
    experts, gates, gate = child(layer, _EXPERTS), child(layer, "gate.to_gates"), child(layer, "gate")
    assert isinstance(experts, nn.ModuleList)
    if not isinstance(gates, nn.Linear):
        raise Declined("gate.to_gates", f"is {type(gates).__name__}, expected nn.Linear")
    check_alone(2 if getattr(layer.experts, "is_distributed", False) else 1, "experts.is_distributed")
    top_k = getattr(gate, "top_n", None)
    if not isinstance(top_k, int):
        raise Declined("gate.top_n", f"is {top_k!r}, expected the experts a token")
    check_containers(layer, "experts", _EXPERTS)
    formula = formula_of(experts, gates.in_features, _EXPERTS)
    network = str(formula) if formula else "called one by one"
    if formula is None and all(_is_own(expert) for expert in experts):
        network = _OWN
    return LibrarySpec(
        library=NAME,
        model_dim=gates.in_features,
        num_experts=len(experts),
        network=network,
        formula=formula,
        top_k=top_k,
    )


class Layer(LibraryMoE):
    experts_path = _EXPERTS

    def examples(self, rows: int = 32) -> list[tuple]:
        return [(x,) for x in batches(self, next(self.experts.parameters()), rows)]

    def run(self, x: torch.Tensor, *args: Any, plan: Plan | None, **named: Any) -> Any:
        """x: [B, N, M]; the rest is for the gate. Returns (y, auxiliary loss, balance loss, z-loss)."""
        dispatch, combine, balance_loss, z_loss = self.gate(self._check_input(x), *args, **named)
        routing = routing_of(combine, self.spec.top_k)
        experts = self._experts()
        if dispatch.requires_grad:
            experts = _StraightThrough(experts, routing.weights)
        y = self.run_routed(x, routing, experts, plan)
        aux_loss = balance_loss * self.balance_loss_coef + z_loss * self.router_z_loss_coef
        result = getattr(type(self.original).forward, "__globals__", {}).get("MixtureOfExpertsReturn", _as_tuple)
        return result(y, aux_loss, balance_loss, z_loss)

    def _experts(self) -> Any:
        modules = self._list()
        if self.spec.network == _OWN and all(_is_own(expert) for expert in modules):
            return _GegluExperts(modules, plain=self.plain)
        return self.listed()


def _as_tuple(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return values


# ---- The library's own expert: down(gelu(gate) * up * scale), up and gate in one Linear ------------------------------

_OWN = "down(gelu(gate(x)) * up(x) * scale)"


def _is_own(expert: nn.Module) -> bool:
    """Two Linear with a gate between them that has at most a scale, and nothing hooked in."""
    net = child(expert, "net")
    if not isinstance(net, nn.Sequential) or len(net) != 3:
        return False
    first, gate, last = net
    plain = type(first) is nn.Linear and type(last) is nn.Linear and not gate._modules
    return (
        plain
        and set(gate._parameters) <= {"mult_bias"}
        and first.out_features == 2 * last.in_features  # type: ignore[operator]
        and not any(intercepted(module) for module in (expert, net, first, gate, last))
    )


class _GegluExperts:
    layouts: tuple[Layout, ...] = ("ragged", "padded")
    expert_kernels: tuple[ExpertKernel, ...] = ("tiled",)

    def __init__(self, modules: nn.ModuleList, *, plain: bool = False) -> None:
        self.plain = plain
        self.firsts, self.gates, self.lasts = zip(*(expert.net for expert in modules))  # type: ignore[union-attr]

    @property
    def hidden_dim(self) -> int:
        return self.lasts[0].in_features

    @property
    def numbers(self) -> int:
        """Parameters of one expert."""
        return sum(p.numel() for module in (self.firsts[0], self.gates[0], self.lasts[0]) for p in module.parameters())

    def kernels_for(self, x: torch.Tensor) -> tuple[ExpertKernel, ...]:
        return self.expert_kernels

    def __call__(self, rows: torch.Tensor, map: DispatchMap, plan: Plan) -> torch.Tensor:
        """rows [R, M] -> [R, M]."""
        if self.plain:
            return each_segment(self._one, rows, map)
        up_R, gate_R = _linear(self.firsts, rows, map, plan).chunk(2, dim=-1)
        hidden_RH = ops.activation(gate_R, up_R, kind="gelu")
        if "mult_bias" in self.gates[0]._parameters:
            scale_EH = torch.stack([gate.mult_bias for gate in self.gates]).to(hidden_RH.dtype)
            hidden_RH = hidden_RH * F.embedding(_expert_of_rows(map), scale_EH)
        return _linear(self.lasts, hidden_RH, map, plan)

    def _one(self, e: int, rows: torch.Tensor) -> torch.Tensor:
        up, gate = self.firsts[e](rows).chunk(2, dim=-1)
        return self.lasts[e](F.gelu(gate) * up * self.gates[e].mult_bias)


def _linear(linears: tuple[nn.Linear, ...], rows: torch.Tensor, map: DispatchMap, plan: Plan) -> torch.Tensor:
    return ops.expert_linear(
        rows,
        map,
        tuple(linear.weight.to(rows.dtype) for linear in linears),
        tuple(linear.bias.to(rows.dtype) for linear in linears if linear.bias is not None),
        tile_rows=plan.tile_rows,
        tile_columns=plan.tile_columns,
    )


def _expert_of_rows(map: DispatchMap) -> torch.Tensor:
    """[R]; for rows behind the last expert's, which are empty, the last one."""
    rows = torch.arange(map.num_rows, device=map.offsets.device, dtype=torch.int32)
    return torch.searchsorted(map.offsets[1:], rows, right=True).clamp(max=map.num_experts - 1)


@dataclass(frozen=True)
class _StraightThrough:
    """Rows multiplied with what is 1 and has the gradient of their slots' weights: how the original dispatches."""

    experts: LinkedExperts | ListedExperts | _GegluExperts
    weights_TK: torch.Tensor

    def __getattr__(self, name: str) -> Any:
        return getattr(self.experts, name)

    def __call__(self, rows: torch.Tensor, map: DispatchMap, plan: Plan) -> torch.Tensor:
        weights_R = self.weights_TK.flatten().index_select(0, map.source.clamp(min=0))
        one_R = 1 + (weights_R - weights_R.detach())
        return self.experts(rows * one_R.unsqueeze(1).to(rows.dtype), map, plan)
