"""mixture-of-experts: `MoE` and `HeirarchicalMoE` (spelt so), with stacked experts w1 [.., M, H] and w2 [.., H, M].

The gates decide with their capacity, policies and random second choices as before, and give dense combine tensors.
B sequences of N tokens, M model dim, E experts, C capacity; O and I: outer experts, and inner ones of each.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from tutelx import ops
from tutelx.experts.network import StackedExperts
from tutelx.integrations.formula import find_activation
from tutelx.integrations.libraries.replacement import LibraryMoE, routing_of
from tutelx.integrations.libraries.structure import batches, check_containers, child
from tutelx.integrations.spec import Declined, LibrarySpec
from tutelx.types import DispatchMap, Plan

NAME = "mixture-of-experts"
_TOP_K = 2  # of Top2Gating


def is_candidate(layer: nn.Module) -> bool:
    found = [child(layer, name) for name in ("gate", "gate_outer", "gate_inner")]
    gates = [gate for gate in found if gate is not None]
    return bool(gates) and all("w_gating" in gate._parameters for gate in gates) and "experts" in layer._modules


def find_spec(layer: nn.Module) -> LibrarySpec:
    """Raises Declined for experts other than the library's own, or of an unknown activation."""
    experts = child(layer, "experts")
    assert experts is not None
    if set(experts._parameters) != {"w1", "w2"} or set(experts._modules) != {"act"}:
        raise Declined("experts", f"is {type(experts).__name__}, expected weights w1, w2 and an activation act")
    w1, w2 = experts._parameters["w1"], experts._parameters["w2"]
    act = experts._modules["act"]
    assert w1 is not None
    assert w2 is not None
    assert act is not None
    levels = 2 if "gate_outer" in layer._modules else 1
    if w1.dim() != levels + 2 or w2.transpose(-1, -2).shape != w1.shape:
        shapes = f"{tuple(w1.shape)} and {tuple(w2.shape)}"
        raise Declined("experts.w1", f"and w2 have shapes {shapes}, expected [.., M, H] and [.., H, M]")
    activation = find_activation(act, "experts.act")
    check_containers(layer, "experts", "experts.act")
    return LibrarySpec(
        library=NAME,
        model_dim=w1.shape[-2],
        num_experts=w1.shape[:levels].numel(),
        network=f"{activation}(x @ w1) @ w2",
        activation=activation,
        top_k=_TOP_K,
    )


class Layer(LibraryMoE):
    def examples(self, rows: int = 32) -> list[tuple]:
        return [(x,) for x in batches(self, self.experts.w1, rows)]

    def run(self, inputs: torch.Tensor, *, plan: Plan | None, **named: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """inputs: [B, N, M]; the original takes further keywords and has no use for them either."""
        self._check_input(inputs)
        return self._run_levels(inputs, plan) if "gate_outer" in self._modules else self._run_one(inputs, plan)

    def _run_one(self, x_BNM: torch.Tensor, plan: Plan | None) -> tuple[torch.Tensor, torch.Tensor]:
        _, combine_BNEC, loss = self.gate(x_BNM)
        y_BNM = self.run_routed(x_BNM, routing_of(combine_BNEC, self.spec.top_k), self._stacked(), plan)
        return y_BNM, loss * self.loss_coef

    def _run_levels(self, x_BNM: torch.Tensor, plan: Plan | None) -> tuple[torch.Tensor, torch.Tensor]:
        _, combine_BNOC, outer_loss = self.gate_outer(x_BNM)
        B, _, O, C = combine_BNOC.shape  # noqa: E741
        x_TM = x_BNM.reshape(-1, x_BNM.shape[-1])
        # The inner gate looks at the padded rows of every outer expert and sequence, and draws a number for each: so
        # those have to be there, in the original's order.
        map, weights_TK = _padded(combine_BNOC, self.spec.top_k)
        rows_OBCM = ops.encode(x_TM, map).reshape(O, B, C, -1)
        # 1 for the first choice of a token, 0.5 for its second, as the original tells them apart.
        weights_R = _of_rows(weights_TK, map.source)
        importance_OBC = (0.5 * ((weights_R > 0.5).float() + (weights_R > 0.0).float())).reshape(O, B, C)
        _, combine_OBCIC, inner_loss = self.gate_inner(rows_OBCM, importance=importance_OBC)
        inner = routing_of(combine_OBCIC, self.spec.top_k)
        first_R1 = torch.arange(O, device=x_TM.device).repeat_interleave(B * C).unsqueeze(1) * combine_OBCIC.shape[-2]
        inner = replace(inner, expert_ids=torch.where(inner.expert_ids >= 0, inner.expert_ids + first_R1, -1).int())
        out_OBCM = self.run_routed(rows_OBCM, inner, self._stacked(), plan)
        y_TM = ops.decode(out_OBCM.reshape(O * B * C, -1), map, weights_TK)
        return y_TM.reshape(x_BNM.shape), (outer_loss + inner_loss) * self.loss_coef

    def _stacked(self) -> StackedExperts:
        levels = self.experts.w1.dim() - 2
        up, down = (w.flatten(0, levels - 1).transpose(1, 2) for w in (self.experts.w1, self.experts.w2))
        assert self.spec.activation is not None
        return StackedExperts(ops.ExpertWeights(up=(up,), down=(down,)), self.spec.activation, plain=self.plain)


def _padded(combine_BNOC: torch.Tensor, top_k: int) -> tuple[DispatchMap, torch.Tensor]:
    """Rows [O, B, C] as the combine tensor numbers them; the weights [T, K] of the tokens' slots."""
    B, N, O, C = combine_BNOC.shape  # noqa: E741
    weights_TK, ids_TK = combine_BNOC.sum(dim=-1).reshape(B * N, O).topk(min(top_k, O), dim=1)
    location_TK = combine_BNOC.argmax(dim=-1).reshape(B * N, O).gather(1, ids_TK)
    sequence_T1 = torch.arange(B, device=ids_TK.device).repeat_interleave(N).unsqueeze(1)
    dest_TK = (ids_TK * B + sequence_T1) * C + location_TK
    used_TK = weights_TK > 0
    # Slots that are not used write behind the last row.
    rows = O * B * C
    source_R = torch.full((rows + 1,), -1, device=ids_TK.device)
    slots = torch.arange(ids_TK.numel(), device=ids_TK.device)
    source_R = source_R.scatter(0, torch.where(used_TK, dest_TK, rows).flatten(), slots)[:rows].int()
    map = DispatchMap(
        dest=torch.where(used_TK, dest_TK, -1).int(),
        source=source_R,
        counts=(source_R.reshape(O * B, C) >= 0).sum(dim=1).int(),
        offsets=(torch.arange(O * B + 1, device=ids_TK.device) * C).int(),
        num_experts=O * B,
        layout="padded",
        capacity=C,
    )
    return map, weights_TK.to(torch.float64 if weights_TK.dtype == torch.float64 else torch.float32)


def _of_rows(weights_TK: torch.Tensor, source_R: torch.Tensor) -> torch.Tensor:
    """The weight of the slot that fills each row; 0 for an empty row."""
    weights_R = weights_TK.detach().flatten().index_select(0, source_R.clamp(min=0))
    return torch.where(source_R >= 0, weights_R, 0.0)
