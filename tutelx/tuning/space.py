"""Which plans a workload can run, and which of them are worth a measurement."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import get_args

from tutelx.errors import InvalidValueError
from tutelx.planner import NARROW, WIDE
from tutelx.tuning.cost import CostModel
from tutelx.types import AllToAll, ExpertKernel, Layout, Plan, Workload

PIPELINE_DEGREES = (1, 2, 4, 8)
MARGIN = 2.0  # times the best prediction, beyond which a plan is not measured
_FEW_ROWS, _FEW_COLUMNS = (64, 256, 1024), (NARROW, WIDE)
_ALL_ROWS, _ALL_COLUMNS = (32, 64, 128, 256, 512, 1024), (128, 256, 512, 1024, 2048)


def legal_plans(workload: Workload, *, default: Plan, exhaustive: bool = False) -> list[Plan]:
    """Plans that the workload can run, `default` first, then in the order of :func:`order`; none twice.

    On one process they differ in layout, expert kernel and, on the CPU, tiles: a few of each, or all of them.

    Over many ranks they are every shard degree, pipeline degree of 1, 2, 4, 8 and all-to-all, run in the default's
    layout, kernel and tiles, and in one more that differs from it; exhaustive: in each that one process would try. A
    plan that gathers the weights (shard degree 0) sends no rows, so it has no chunks and no all-to-all. Two-step
    all-to-alls are left out where one of the steps has nobody to send to; exhaustive: they are not.

    Raises:
        InvalidValueError: the default is none that the workload can run.
    """
    if not is_legal(default, workload):
        raise InvalidValueError(f"default={default} is no plan for {workload}")
    found: Iterable[Plan]
    if workload.world == 1:
        found = _local(workload, default, exhaustive=exhaustive)
    else:
        kinds = _local(workload, default, exhaustive=False) if exhaustive else _few_kinds(workload, default)
        found = (
            replace(kind, shard_degree=shard, pipeline_degree=pipeline, all_to_all=all_to_all)
            for kind in kinds
            for shard, pipeline, all_to_all in _across(workload, exhaustive=exhaustive)
        )
    others = {plan for plan in found if is_legal(plan, workload)} - {default}
    return [default, *sorted(others, key=order)]


def is_legal(plan: Plan, workload: Workload) -> bool:
    """Whether a layer with this workload runs the plan."""
    return (
        plan.layout in workload.layouts
        and plan.expert_kernel in workload.expert_kernels
        and plan.shard_degree in workload.shard_degrees
        and plan.all_to_all in workload.all_to_alls
        and (workload.world > 1 or plan.pipeline_degree == 1)
    )


def prune(plans: Sequence[Plan], workload: Workload, cost_model: CostModel, margin: float = MARGIN) -> list[Plan]:
    """Without the plans that are predicted to take more than `margin` times the best prediction.

    The first plan is the default and always stays. Plans whose prediction is no finite number stay too.

    Raises:
        InvalidValueError: a margin below 1, with which even the best would go.
    """
    if not margin >= 1:
        raise InvalidValueError(f"margin={margin} must be at least 1")
    predicted = [cost_model.predict(workload, plan).total for plan in plans]
    least = min((seconds for seconds in predicted if math.isfinite(seconds)), default=math.inf)
    return [
        plan
        for i, (plan, seconds) in enumerate(zip(plans, predicted))
        if i == 0 or not math.isfinite(seconds) or seconds <= margin * least
    ]


def order(plan: Plan) -> tuple[int, ...]:
    """Shard degree, pipeline degree, all-to-all, layout, kernel, tile rows and columns; names as types.py has them."""
    return (
        plan.shard_degree,
        plan.pipeline_degree,
        get_args(AllToAll).index(plan.all_to_all),
        get_args(Layout).index(plan.layout),
        get_args(ExpertKernel).index(plan.expert_kernel),
        plan.tile_rows,
        plan.tile_columns,
    )


def _across(workload: Workload, *, exhaustive: bool) -> Iterator[tuple[int, int, AllToAll]]:
    m = workload.ranks_per_node
    two_steps = exhaustive or (m is not None and 1 < m < workload.world)
    for shard in workload.shard_degrees:
        if shard == 0:
            yield shard, 1, "linear"
            continue
        for pipeline in PIPELINE_DEGREES:
            for all_to_all in workload.all_to_alls:
                if all_to_all == "linear" or two_steps:
                    yield shard, pipeline, all_to_all


def _few_kinds(workload: Workload, default: Plan) -> list[Plan]:
    """The default's layout, kernel and tiles, and the other that most often is faster."""
    if workload.device == "cpu":
        return [default, replace(default, tile_columns=NARROW if default.tile_columns > NARROW else WIDE)]
    return [default, Plan(layout="padded", expert_kernel="bmm")]


def _local(workload: Workload, default: Plan, *, exhaustive: bool) -> list[Plan]:
    """Layouts, expert kernels and tiles."""
    tiles = [(default.tile_rows, default.tile_columns)]
    if workload.device == "cpu":
        rows, columns = (_ALL_ROWS, _ALL_COLUMNS) if exhaustive else (_FEW_ROWS, _FEW_COLUMNS)
        tiles += [
            (r, c)
            for r in _distinct(rows, default.tile_rows, _fullest(workload))
            for c in _distinct(columns, default.tile_columns, max(workload.model_dim, workload.hidden_dim))
        ]
    found = []
    for layout in get_args(Layout):
        # What the layout changes, it changes with any tiles.
        for r, c in tiles if exhaustive or layout == default.layout else tiles[:1]:
            found.append(Plan(layout=layout, expert_kernel="tiled", tile_rows=r, tile_columns=c))
    found.append(Plan(layout="padded", expert_kernel="bmm"))
    found.append(Plan(layout="ragged", expert_kernel="grouped"))
    if exhaustive:
        found.append(Plan(layout="padded", expert_kernel="grouped"))
    return found


def _fullest(workload: Workload) -> int:
    """Rows that an expert has at most on this process."""
    known = [rows for rows in (workload.demand, workload.capacity) if rows is not None]
    return min(known, default=workload.tokens)


def _distinct(sizes: Sequence[int], default: int, limit: int) -> list[int]:
    """`sizes` and the default; of those from `limit` on, with which nothing is cut, only one."""
    found = sorted({*sizes, default})
    whole = [size for size in found if size >= limit]
    keep = default if default in whole else next(iter(whole), None)
    return [size for size in found if size < limit or size == keep]
