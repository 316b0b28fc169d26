"""route, in the dropless layout. T tokens, K choices, E experts."""

from __future__ import annotations

from typing import NamedTuple

import torch

from tutelx import ops
from tutelx.bench import limits
from tutelx.bench.shapes import Shape
from tutelx.bench.subject import Subject, Tensors, Way
from tutelx.ops import reference
from tutelx.testing import cases
from tutelx.types import DispatchMap

LARGEST_ONE_HOT = 2**22


class RouteInputs(NamedTuple):
    expert_ids: torch.Tensor
    num_experts: int


def case_of(shape: Shape) -> cases.Case:
    return cases.Case(tokens=shape.T, top_k=shape.K, num_experts=shape.E, dim=shape.D)


def ids_of(shape: Shape) -> torch.Tensor:
    """[T, K] int32: random, or with the fullest expert at S times the mean."""
    if shape.S == 1:
        return cases.expert_ids(case_of(shape))
    return cases.skewed_ids(case_of(shape), round(shape.S * shape.rows / shape.E))


def touched(shape: Shape) -> int:
    """Experts that get a row, with the ids that every benchmark uses."""
    return ids_of(shape).unique().numel()


def _make(shape: Shape, dtype: torch.dtype) -> RouteInputs:
    return RouteInputs(ids_of(shape), shape.E)


def _argsort(inputs: RouteInputs) -> Tensors:
    """Slots sorted by expert, all first choices before all second ones, as ours hands out its rows."""
    ids_TK, num_experts = inputs
    tokens, choices = ids_TK.shape
    order = torch.argsort(ids_TK.T.reshape(-1), stable=True)
    counts = torch.bincount(ids_TK.reshape(-1), minlength=num_experts)
    return _maps(order, counts, tokens, choices)


def _maps(order: torch.Tensor, counts: torch.Tensor, tokens: int, choices: int) -> Tensors:
    """order [R]: the slots k*T+t in the order of their rows."""
    source = (order % tokens * choices + order // tokens).int()
    dest = torch.empty_like(source)
    dest[source.long()] = torch.arange(source.numel(), dtype=torch.int32, device=source.device)
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
    return dest.reshape(tokens, choices), source, counts.int(), offsets


def _one_hot_cumsum(inputs: RouteInputs) -> Tensors:
    """The masks of GShard: a column for each expert, a running sum down each."""
    ids_TK, num_experts = inputs
    tokens, choices = ids_TK.shape
    flat = ids_TK.T.reshape(-1).long()
    mask_RE = torch.nn.functional.one_hot(flat, num_experts)
    counts = mask_RE.sum(dim=0)
    location = (mask_RE.cumsum(dim=0) * mask_RE).sum(dim=1) - 1
    row_of = location + (counts.cumsum(0) - counts)[flat]
    order = torch.empty_like(row_of)
    order[row_of] = torch.arange(row_of.numel(), device=row_of.device)
    return _maps(order, counts, tokens, choices)


def _one_hot_unfit(shape: Shape) -> str | None:
    elements = shape.rows * shape.E
    if elements <= LARGEST_ONE_HOT:
        return None
    return f"a one-hot mask of {elements:.1e} elements exceeds {LARGEST_ONE_HOT:.1e}"


def _from_reference(inputs: RouteInputs) -> Tensors:
    return tuple(torch.tensor(part) for part in reference.route(*inputs))


def _compared(inputs: RouteInputs, output: DispatchMap | Tensors) -> Tensors:
    parts = (output.dest, output.source, output.counts, output.offsets) if isinstance(output, DispatchMap) else output
    return tuple(part.to(inputs.expert_ids.device) for part in parts)


SUBJECTS = (
    Subject(
        op="route",
        make=_make,
        ours=lambda inputs: ops.route(*inputs),
        plain=(
            Way(name="argsort", call=_argsort),
            Way(name="one-hot cumsum", call=_one_hot_cumsum, unfit=_one_hot_unfit),
        ),
        reference=_from_reference,
        must_move=limits.route,
        compared=_compared,
    ),
)
