"""Experts that are the user's own modules."""

from __future__ import annotations

import torch
from torch import nn

from tutelx.errors import InvalidValueError
from tutelx.experts.base import Experts
from tutelx.ops.segments import each_segment
from tutelx.types import DispatchMap, Plan


class ListedExperts(Experts):
    """E modules, each called with its own rows [n, M], n = 0 included, so that every parameter has a gradient."""

    def __init__(self, modules: nn.ModuleList) -> None:
        super().__init__()
        self.experts = modules

    def forward(self, rows: torch.Tensor, map: DispatchMap, plan: Plan) -> torch.Tensor:
        return call_each(self.experts, rows, map)


class BatchedExperts(Experts):
    """One module called with all rows in the padded layout: [E, C, M] -> [E, C, M]."""

    layouts = ("padded",)

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, rows: torch.Tensor, map: DispatchMap, plan: Plan) -> torch.Tensor:
        rows_ECM = rows.reshape(map.num_experts, map.num_rows // map.num_experts, rows.shape[1])
        return _same_shape(self.module(rows_ECM), rows_ECM, "experts").reshape(rows.shape)


def call_each(
    modules: nn.ModuleList, rows: torch.Tensor, map: DispatchMap, *, skip_empty: bool = False
) -> torch.Tensor:
    """Calls each child of `modules` with its own rows [n, M]; rows [R, M] -> [R, M].

    skip_empty: a module that got no rows is not called, so that its parameters have no gradient.

    Raises:
        InvalidValueError: there are not num_experts modules, or one returns another shape than that of its rows.
    """
    if len(modules) != map.num_experts:
        raise InvalidValueError(f"experts holds {len(modules)} modules, num_experts={map.num_experts}")
    experts = list(modules)
    return each_segment(
        lambda e, mine: _same_shape(experts[e](mine), mine, f"experts[{e}]"), rows, map, skip_empty=skip_empty
    )


def _same_shape(out: torch.Tensor, rows: torch.Tensor, name: str) -> torch.Tensor:
    if out.shape != rows.shape:
        raise InvalidValueError(f"{name} returned shape {tuple(out.shape)} for rows of shape {tuple(rows.shape)}")
    return out
