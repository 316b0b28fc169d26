"""DeepSpeed: `deepspeed.moe.layer.MoE`, of which the `MOELayer` inside is what runs here.

The layer around it stays the library's, residual MLP and returned tuple included. Its gate, `TopKGate`, decides with
capacity, random token selection and noise as before. T tokens, E experts, K choices.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from tutelx.errors import InvalidTypeError
from tutelx.integrations.libraries.replacement import LibraryMoE, routing_of
from tutelx.integrations.libraries.structure import batches, check_alone, check_containers, child, formula_of
from tutelx.integrations.spec import Declined, LibrarySpec
from tutelx.types import Plan, Routing

NAME = "DeepSpeed"
_EXPERTS = "experts.deepspeed_experts"


def is_candidate(layer: nn.Module) -> bool:
    return isinstance(child(layer, _EXPERTS), nn.ModuleList) and child(layer, "gate.wg") is not None


def find_spec(layer: nn.Module) -> LibrarySpec:
    """Raises Declined for what is spread over ranks, and for a gate with other attributes than `TopKGate`'s."""
    experts, wg, gate = child(layer, _EXPERTS), child(layer, "gate.wg"), child(layer, "gate")
    assert isinstance(experts, nn.ModuleList)
    if not isinstance(wg, nn.Linear):
        raise Declined("gate.wg", f"is {type(wg).__name__}, expected nn.Linear")
    check_alone(int(getattr(layer, "ep_size", 1)), "ep_size")
    if _tensor_parallel(layer):
        raise Declined("forward", "shares tokens among ranks of tensor parallelism")
    top_k = getattr(gate, "k", None)
    if not isinstance(top_k, int):
        raise Declined("gate.k", f"is {top_k!r}, expected the experts a token")
    check_containers(layer, "experts", _EXPERTS)
    formula = formula_of(experts, wg.in_features, _EXPERTS)
    return LibrarySpec(
        library=NAME,
        model_dim=wg.in_features,
        num_experts=len(experts),
        network=str(formula or "called one by one"),
        formula=formula,
        top_k=top_k,
    )


def _tensor_parallel(layer: nn.Module) -> bool:
    groups = getattr(type(layer).forward, "__globals__", {}).get("groups")
    return getattr(groups, "mpu", None) is not None


class Layer(LibraryMoE):
    leaves = ("l_aux", "exp_counts")
    experts_path = _EXPERTS

    def examples(self, rows: int = 32) -> list[tuple]:
        like = next(self.experts.parameters())
        return [(x, None) for x in batches(self, like, rows)]

    def steps_aside(self, *args: Any, **named: Any) -> bool:
        return _tensor_parallel(self.original)

    def run(self, *inputs: torch.Tensor, plan: Plan | None, **named: Any) -> torch.Tensor:
        """inputs: tokens [..., M] and which of them are used, [T] or None."""
        if not inputs:
            raise InvalidTypeError("nothing was given, expected tokens and which of them are used")
        x, used = inputs[0], inputs[1] if len(inputs) > 1 else None
        x_TM = self._check_input(x).reshape(-1, x.shape[-1])
        if _gives_routes(self.gate):
            aux, _, _, ids, _, weights, counts = self.gate(x_TM, used, True, self.use_tutel)
            routing = Routing(expert_ids=_columns(ids).int(), weights=_wide(_columns(weights)), requested=counts)
        else:
            aux, combine_TEC, _, counts = self.gate(x_TM, used)
            routing = routing_of(combine_TEC, self.spec.top_k)
        self.leave("l_aux", aux)
        self.leave("exp_counts", counts)
        return self.run_routed(x, routing, self.listed(), plan)


def _gives_routes(gate: nn.Module) -> bool:
    """Newer gates can give a list of choices in the place of the dense tensor [T, E, C]."""
    return "sparse_routes" in inspect.signature(type(gate).forward).parameters


def _columns(rows_KT: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(rows_KT), dim=1)


def _wide(weights: torch.Tensor) -> torch.Tensor:
    return weights if weights.dtype == torch.float64 else weights.float()
