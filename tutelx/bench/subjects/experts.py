"""expert_ffn and expert_linear, forward: gated experts, and one matrix an expert, over the rows that arrived.

R rows, E experts, D model dim, H hidden dim.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch.nn import functional as F

from tutelx import ops
from tutelx.bench import limits
from tutelx.bench.shapes import Shape
from tutelx.bench.subject import Subject, Way
from tutelx.bench.subjects.route import ids_of, touched
from tutelx.ops import reference
from tutelx.testing import cases
from tutelx.types import DispatchMap


@dataclass
class ExpertInputs:
    """used: the experts that got a row, each with its rows' begin and end, known on the host."""

    rows_RD: torch.Tensor
    map: DispatchMap
    weights: ops.ExpertWeights
    used: list[tuple[int, int, int]]


def spans(map: DispatchMap) -> list[tuple[int, int, int]]:
    """(expert, begin, end) of those that got a row, in the dropless layout."""
    begins = map.offsets.tolist()
    return [(e, begin, end) for e, (begin, end) in enumerate(pairwise(begins)) if end > begin]


def _make(shape: Shape, dtype: torch.dtype) -> ExpertInputs:
    map = ops.route(ids_of(shape), shape.E)
    weights = cases.expert_weights(
        shape.E, shape.D, shape.H, gated=True, bias=False, listed=False, dtype=dtype, grad=False
    )
    return ExpertInputs(cases.tensor(shape.rows, shape.D, dtype=dtype), map, weights, spans(map))


def _rotate(inputs: ExpertInputs, copies: int) -> list[ExpertInputs]:
    """Few tokens touch few experts: each set takes the next experts, and copies the weights only after the last."""
    used = [e for e, _, _ in inputs.used]
    num_experts, choices = inputs.map.num_experts, inputs.map.dest.shape[1]
    sets_a_copy = max(1, num_experts // len(used))
    expert_R = torch.repeat_interleave(torch.arange(num_experts), inputs.map.counts.cpu().long())
    rank_TK = torch.searchsorted(torch.tensor(used), expert_R)[inputs.map.dest.cpu().reshape(-1, choices).long()]
    weights, sets = inputs.weights, []
    for i in range(copies):
        if i and i % sets_a_copy == 0:
            weights = copy.deepcopy(weights)
        ids_TK = (rank_TK + i % sets_a_copy * len(used)).int().to(inputs.rows_RD.device)
        map = ops.route(ids_TK, num_experts)
        sets.append(ExpertInputs(inputs.rows_RD.clone(), map, weights, spans(map)))
    return sets


def _loop(inputs: ExpertInputs) -> torch.Tensor:
    """Expert by expert; each knows its rows without asking the device."""
    gates, ups, downs = (ws[0] for ws in (inputs.weights.gate, inputs.weights.up, inputs.weights.down))
    out = torch.empty_like(inputs.rows_RD)
    for e, begin, end in inputs.used:
        x = inputs.rows_RD[begin:end]
        hidden = F.silu(x @ gates[e].T) * (x @ ups[e].T)
        torch.mm(hidden, downs[e].T, out=out[begin:end])
    return out


def _grouped_mm(inputs: ExpertInputs) -> torch.Tensor:
    gate, up, down = (ws[0].transpose(1, 2) for ws in (inputs.weights.gate, inputs.weights.up, inputs.weights.down))
    ends = inputs.map.offsets[1:]
    hidden = F.silu(F.grouped_mm(inputs.rows_RD, gate, offs=ends)) * F.grouped_mm(inputs.rows_RD, up, offs=ends)
    return F.grouped_mm(hidden, down, offs=ends)


def _gemms(inputs: ExpertInputs) -> None:
    """The three products of each expert, and nothing between them."""
    gates, ups, downs = (ws[0] for ws in (inputs.weights.gate, inputs.weights.up, inputs.weights.down))
    for e, begin, end in inputs.used:
        x = inputs.rows_RD[begin:end]
        torch.mm(x, gates[e].T)
        torch.mm(torch.mm(x, ups[e].T), downs[e].T)


def _up_loop(inputs: ExpertInputs) -> torch.Tensor:
    (ups,) = inputs.weights.up
    out = inputs.rows_RD.new_empty((inputs.rows_RD.shape[0], ups.shape[1]))
    for e, begin, end in inputs.used:
        torch.mm(inputs.rows_RD[begin:end], ups[e].T, out=out[begin:end])
    return out


def _up_grouped_mm(inputs: ExpertInputs) -> torch.Tensor:
    (ups,) = inputs.weights.up
    return F.grouped_mm(inputs.rows_RD, ups.transpose(1, 2), offs=inputs.map.offsets[1:])


SUBJECTS = (
    Subject(
        op="expert_ffn",
        make=_make,
        rotate=_rotate,
        ours=lambda inputs: ops.expert_ffn(inputs.rows_RD, inputs.map, inputs.weights),
        plain=(Way(name="loop of mm", call=_loop), Way(name="grouped_mm", call=_grouped_mm)),
        reference=lambda inputs: reference.expert_ffn(inputs.rows_RD, inputs.map, inputs.weights),
        gemms=_gemms,
        must_move=lambda shape, S: limits.expert_ffn(shape, S, touched(shape)),
        flops=limits.expert_ffn_flops,
    ),
    Subject(
        op="expert_linear",
        make=_make,
        rotate=_rotate,
        ours=lambda inputs: ops.expert_linear(inputs.rows_RD, inputs.map, inputs.weights.up),
        plain=(Way(name="loop of mm", call=_up_loop), Way(name="grouped_mm", call=_up_grouped_mm)),
        reference=lambda inputs: reference.expert_linear(inputs.rows_RD, inputs.map, inputs.weights.up[0]),
        gemms=_up_loop,
        must_move=lambda shape, S: limits.expert_linear(shape, S, touched(shape)),
        flops=limits.expert_linear_flops,
    ),
)
