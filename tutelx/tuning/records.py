"""A measurement as the database keeps it: one workload, every plan that was tried, the default among them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from tutelx.errors import InvalidValueError
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

    def __str__(self) -> str:
        plain = Plan(layout=self.layout, expert_kernel=self.expert_kernel)  # type: ignore[arg-type]
        text = str(self.plan(plain))
        if self.expert_kernel != "tiled":
            return text
        rows, columns = self.tile_rows, self.tile_columns
        told = "tiled" if rows is None and columns is None else f"{rows or '*'}x{columns or '*'}"
        return text.replace(f"{rows or plain.tile_rows}x{columns or plain.tile_columns}", told, 1)

    @property
    def order(self) -> tuple[str, str, int, int, str, int, int]:
        """What plans are sorted by where nothing else decides."""
        tiles = (self.tile_rows or 0, self.tile_columns or 0)
        return (self.layout, self.expert_kernel, self.shard_degree, self.pipeline_degree, self.all_to_all, *tiles)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One plan's timing, in seconds of a call, of the slowest rank.

    n: timed turns; 0 only of a wrong one that was not timed, whose median and ratio are 0.
    ratio: median over the turns of its time over the default's in the same turn; drift of the machine cancels in it.
    spread: how far the true ratio may lie from `ratio`: two standard errors of that median; 0: not known.
    error: the largest relative error against the reference, of outputs and gradients; None if it was not checked or,
        of a wrong one, is no finite number.
    status: "wrong": the error was too large, never to be chosen; "slow": stopped early as a clear loser.

    Raises:
        InvalidValueError: a number is none that could have been measured.
    """

    plan: StoredPlan
    median: float
    iqr: float
    n: int
    ratio: float
    error: float | None
    status: Status = "ok"
    spread: float = 0.0

    def __post_init__(self) -> None:
        timed = self.n >= 1 and self.median > 0 and self.ratio > 0
        untimed = self.status == "wrong" and self.n == 0 and self.median == 0 and self.ratio == 0
        least = min(self.iqr, self.spread, self.error or 0.0)
        finite = all(math.isfinite(x) for x in (self.median, self.iqr, self.ratio, self.spread, self.error or 0.0))
        if not (timed or untimed) or not finite or least < 0:
            raise InvalidValueError(
                f"n={self.n}, median={self.median}, iqr={self.iqr}, ratio={self.ratio}, spread={self.spread},"
                f" error={self.error} of a plan that is {self.status!r} cannot have been measured"
            )


@dataclass(frozen=True, kw_only=True)
class Record:
    """Everything that was measured for one key at one time.

    default: what the rules choose; always among the candidates.
    software: versions by name ("tutelx", "torch", "python", "cuda", ...).
    provenance: "date" (ISO 8601, UTC), "command", and what else the measurement says of itself.

    Raises:
        InvalidValueError: the default is not among the candidates, or a plan is there twice.
    """

    hardware: Hardware
    key: Key
    default: StoredPlan
    candidates: tuple[Candidate, ...]
    software: dict[str, str] = field(hash=False)
    provenance: dict[str, str] = field(hash=False)
    op: str = "layer"
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        plans = [candidate.plan for candidate in self.candidates]
        if self.default not in plans:
            raise InvalidValueError(f"the default {self.default} is not among the {len(plans)} candidates")
        if len(set(plans)) < len(plans):
            twice = next(plan for plan in plans if plans.count(plan) > 1)
            raise InvalidValueError(f"the plan {twice} is among the candidates twice")

    @property
    def by_plan(self) -> dict[StoredPlan, Candidate]:
        return {candidate.plan: candidate for candidate in self.candidates}

    @property
    def best(self) -> Candidate:
        """The one with the least ratio of those that are right; the default where none beats it beyond the spread."""
        right = [c for c in self.candidates if c.plan == self.default or (c.status == "ok" and c.ratio + c.spread < 1)]
        return min(right, key=lambda c: (c.ratio, c.plan != self.default))
