"""Tiles of stored plans, relative to the tile of the rules, which is another number at the next key."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from tutelx.planner import RulePlanner
from tutelx.tuning.key import Key
from tutelx.tuning.records import StoredPlan


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """rows, columns: of the rules' tile for a key. most_rows, most_columns: of an expert; larger tiles cut nothing."""

    rows: int
    columns: int
    most_rows: int
    most_columns: int


_RULES = RulePlanner()


@lru_cache(maxsize=4096)
def of_rules(key: Key) -> Tiles:
    """For the smallest workload of the key's bucket."""
    workload = key.workload()
    plan = _RULES.plan(workload).plan
    return Tiles(
        rows=plan.tile_rows,
        columns=plan.tile_columns,
        most_rows=max(1, key.tokens if workload.demand is None else workload.demand),
        most_columns=max(key.model_dim, key.hidden_dim),
    )


def relative(plan: StoredPlan, tiles: Tiles) -> StoredPlan:
    """Each side of the tile that is the rules' own is left to them."""
    return replace(
        plan,
        tile_rows=None if plan.tile_rows == tiles.rows else plan.tile_rows,
        tile_columns=None if plan.tile_columns == tiles.columns else plan.tile_columns,
    )


def absolute(plan: StoredPlan, tiles: Tiles) -> StoredPlan:
    """The tile in numbers, where the kernel has tiles; all that cut nothing are one."""
    if plan.expert_kernel != "tiled":
        return plan
    rows, columns = plan.tile_rows or tiles.rows, plan.tile_columns or tiles.columns
    return replace(plan, tile_rows=min(rows, tiles.most_rows), tile_columns=min(columns, tiles.most_columns))
