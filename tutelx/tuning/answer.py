"""What a look-up answers, and how it chooses among the plans that neighbours have timed."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from tutelx.tuning.estimate import Estimate, Neighbour, Trend, estimate_default, estimates
from tutelx.tuning.key import Key
from tutelx.tuning.records import StoredPlan
from tutelx.tuning.shelves import Shelf
from tutelx.tuning.space import is_legal
from tutelx.types import Plan, Workload

Tier = Literal["exact", "nearest", "sibling", "model", "default"]
TIERS: tuple[Tier, ...] = get_args(Tier)

_LARGEST_TILE = 2**20
_MOST_CHUNKS = 64


@dataclass(frozen=True, kw_only=True)
class Considered:
    """A plan that a tier knew of. ratio: its time over the default's. verdict: why it was not chosen; "" if it was."""

    plan: StoredPlan
    ratio: float
    predicted: float | None
    verdict: str


@dataclass(frozen=True, kw_only=True)
class Tried:
    """A tier that was asked before the one that answered, and why it did not."""

    tier: Tier
    reason: str


@dataclass(frozen=True, kw_only=True)
class Answer:
    """predicted: seconds of a call; None if nobody knows. measured: the same, where this plan was timed for this key.

    distance: octaves to the nearest key that speaks, and to its machine; 0 if none does.
    """

    plan: Plan
    tier: Tier
    reason: str
    predicted: float | None = None
    measured: float | None = None
    distance: float = 0.0
    considered: tuple[Considered, ...] = ()
    tried: tuple[Tried, ...] = ()


def can_run(plan: Plan, workload: Workload) -> bool:
    """Whether the layer that asks can run it, at sizes that somebody may have meant."""
    sensible = plan.pipeline_degree <= _MOST_CHUNKS and max(plan.tile_rows, plan.tile_columns) <= _LARGEST_TILE
    return sensible and is_legal(plan, workload)


def choose(
    tier: Tier,
    shelf: Shelf,
    key: Key,
    around: Sequence[Neighbour],
    workload: Workload,
    default: Plan,
    *,
    margin: float,
    trend: Trend | None = None,
    wrong: Collection[StoredPlan] = (),
) -> Answer:
    """The plan with the least estimate that beats the default by `margin` and what measurements are unsure of."""
    stored_default = StoredPlan.of(default, default)
    found = estimates(key, around, stored_default, wrong, trend)
    base = estimate_default(key, around, stored_default, trend)
    log_base = base.log_seconds
    sure_base = log_base if base.keys or trend is None else log_base - base.spread
    best: Estimate | None = None
    considered: list[tuple[Estimate, str]] = []
    for estimate in sorted(found.values(), key=lambda e: (e.log_seconds, e.plan.order)):
        is_default = estimate.plan.plan(default) == default
        verdict = _verdict(estimate, workload, default, sure_base, margin, is_default=is_default)
        if not verdict and best is None:
            best = estimate
        elif not verdict:
            verdict = "another takes less"
        considered.append((estimate, verdict))
    answer = base if best is None else best
    plan = default if best is None else best.plan.plan(default)
    gain = math.exp((log_base if best is None else best.log_seconds) - log_base)
    reason = (
        f"the default, which none of {len(found)} plans beats" if best is None else f"{gain:.2f} of the default's time"
    )
    seconds = answer.seconds
    return Answer(
        plan=plan,
        tier=tier,
        reason=f"{reason}; {_where(tier, shelf, key, around)}",
        predicted=seconds,
        measured=seconds if tier == "exact" else None,
        distance=around[0].distance + shelf.distance,
        considered=tuple(
            Considered(
                plan=each.plan,
                ratio=math.exp(each.log_seconds - log_base),
                predicted=each.seconds,
                verdict="" if best is None and each.plan == stored_default else verdict,
            )
            for each, verdict in considered
        ),
    )


def _verdict(
    estimate: Estimate, workload: Workload, default: Plan, log_base: float, margin: float, *, is_default: bool
) -> str:
    """Why it is not chosen; "" if nothing speaks against it."""
    if is_default:
        return "the default"
    if estimate.wrong:
        return "its results were wrong"
    if not estimate.keys:
        return "was not timed"
    if not can_run(estimate.plan.plan(default), workload):
        return "cannot run here"
    gain = 1 - math.exp(estimate.log_seconds + estimate.spread - log_base)
    if gain <= margin:
        return "takes no less than the default" if estimate.log_seconds >= log_base else "gains too little to be sure"
    return ""


def _where(tier: Tier, shelf: Shelf, key: Key, around: Sequence[Neighbour]) -> str:
    if tier == "exact":
        text = "measured for this key"
    else:
        keys = "one key" if len(around) == 1 else f"{len(around)} keys"
        text = f"from {keys}, the nearest {around[0].distance:.2g} octaves away"
        if tier == "sibling":
            text += f", on {shelf.name}, {shelf.distance:.2g} octaves from this machine"
    stale = sorted({each for neighbour in around for each in shelf.stale.get(neighbour.key, ())})
    return f"{text} ({'; '.join(stale)})" if stale else text
