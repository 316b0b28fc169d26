"""A measurement as the database keeps it: one workload, every plan that was tried, the default among them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tutelx.tuning.hardware import Hardware
from tutelx.tuning.key import Key
from tutelx.types import Plan

SCHEMA = 1

Status = Literal["ok", "wrong", "slow"]


@dataclass(frozen=True, kw_only=True)
class StoredPlan:
    """A plan as it is stored. tile_rows, tile_columns: None: what the rules say for the workload at hand."""

    layout: str
    expert_kernel: str
    shard_degree: int = 1
    pipeline_degree: int = 1
    all_to_all: str = "linear"
    tile_rows: int | None = None
    tile_columns: int | None = None

    @classmethod
    def of(cls, plan: Plan, by_rule: Plan | None = None) -> StoredPlan:
        """by_rule: the rules' plan for the same workload; tiles that equal its tiles are not stored."""
        tiles: tuple[int | None, int | None] = (plan.tile_rows, plan.tile_columns)
        ruled = by_rule is not None and tiles == (by_rule.tile_rows, by_rule.tile_columns)
        if ruled or plan.expert_kernel != "tiled":
            tiles = (None, None)
        return cls(
            layout=plan.layout,
            expert_kernel=plan.expert_kernel,
            shard_degree=plan.shard_degree,
            pipeline_degree=plan.pipeline_degree,
            all_to_all=plan.all_to_all,
            tile_rows=tiles[0],
            tile_columns=tiles[1],
        )

    def plan(self, by_rule: Plan) -> Plan:
        """To be run where the rules would run `by_rule`."""
        return Plan(
            layout=self.layout,  # type: ignore[arg-type]
            expert_kernel=self.expert_kernel,  # type: ignore[arg-type]
            shard_degree=self.shard_degree,
            pipeline_degree=self.pipeline_degree,
            all_to_all=self.all_to_all,  # type: ignore[arg-type]
            tile_rows=self.tile_rows or by_rule.tile_rows,
            tile_columns=self.tile_columns or by_rule.tile_columns,
        )


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One plan's timing, in seconds of a call, of the slowest rank.

    ratio: median over the turns of its time over the default's in the same turn; drift of the machine cancels in it.
    spread: how far the true ratio may lie from `ratio`: two standard errors of that median.
    error: the largest relative error against the reference, of outputs and gradients; None if it was not checked.
    status: "wrong": the error was too large, never to be chosen; "slow": stopped early as a clear loser.
    """

    plan: StoredPlan
    median: float
    iqr: float
    n: int
    ratio: float
    error: float | None
    status: Status = "ok"
    spread: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Record:
    """Everything that was measured for one key at one time.

    default: what the rules choose; always among the candidates.
    software: versions by name ("tutelx", "torch", "python", "cuda", ...).
    provenance: "date" (ISO 8601, UTC), "command", and what else the measurement says of itself.
    """

    hardware: Hardware
    key: Key
    default: StoredPlan
    candidates: tuple[Candidate, ...]
    software: dict[str, str] = field(hash=False)
    provenance: dict[str, str] = field(hash=False)
    op: str = "layer"
    schema: int = SCHEMA

    @property
    def best(self) -> Candidate:
        """The one with the least ratio of those that are right; the default where none beats it beyond the spread."""
        right = [c for c in self.candidates if c.plan == self.default or (c.status == "ok" and c.ratio + c.spread < 1)]
        return min(right, key=lambda c: (c.ratio, c.plan != self.default))
