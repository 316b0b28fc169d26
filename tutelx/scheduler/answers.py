"""What to run for a workload: the tiers of knowledge in their order, and why one of them answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from tutelx.planner import MOST_PADDING, RulePlanner
from tutelx.tuning.cost import CostModel
from tutelx.tuning.key import Key
from tutelx.tuning.records import Record, StoredPlan
from tutelx.types import Plan, Workload

LARGEST_TILE = 1 << 20
MOST_CHUNKS = 64
MODEL_MARGIN = 0.2  # what a model may be wrong by
MOST_SECONDS = 2.0  # times the best prediction, of a plan that is tried in a real step

_RULES = RulePlanner()


class Found(Protocol):
    """A record that speaks for a key. tier: "exact", "nearest" or "sibling"; reason: how far off it is, in words."""

    @property
    def record(self) -> Record: ...
    @property
    def tier(self) -> str: ...
    @property
    def reason(self) -> str: ...


class Lookup(Protocol):
    """Finds the record that speaks for a key, or None."""

    def find(self, key: Key) -> Found | None: ...


@dataclass(frozen=True, kw_only=True)
class Answer:
    """source: the tier. settled: measured for this very key, so that there is nothing to explore.

    predicted, measured: seconds of a call; None if unknown.
    """

    plan: Plan
    source: str
    reason: str
    predicted: float | None = None
    measured: float | None = None
    settled: bool = False


def runnable(plan: Plan, workload: Workload) -> bool:
    """Whether the layer that asks can run the plan, at sizes that somebody may have meant."""
    return (
        plan.layout in workload.layouts
        and plan.expert_kernel in workload.expert_kernels
        and plan.shard_degree in workload.shard_degrees
        and plan.all_to_all in workload.all_to_alls
        and plan.pipeline_degree <= (MOST_CHUNKS if workload.world > 1 else 1)
        and plan.tile_rows <= LARGEST_TILE
        and plan.tile_columns <= LARGEST_TILE
    )


class Knowledge:
    """lookup: what was measured; None: nothing. model: what a plan should take, if its rates are known.

    plans: those that a workload can run, the default first.
    margin: a plan that was not measured for this very key must be faster than the default by this share of its time.
    """

    def __init__(
        self,
        lookup: Lookup | None = None,
        model: CostModel | None = None,
        *,
        plans: Callable[[Workload], Sequence[Plan]],
        margin: float = 0.02,
    ) -> None:
        self.lookup, self.model, self.plans, self.margin = lookup, model, plans, margin

    def answer(self, workload: Workload) -> Answer:
        """The first of these that knows of a plan which can run: a record of this key, of a near one, of a sibling
        machine; the cost model; the rules."""
        ruled = _RULES.plan(workload)
        why = "nothing was measured"
        if self.lookup is not None:
            found = self.lookup.find(Key.of(workload))
            if found is None:
                why = "no measurement is near enough"
            else:
                return self._measured(found, workload, ruled.plan)
        if self.model is not None:
            modelled = self._modelled(workload, ruled.plan, why)
            if modelled is not None:
                return modelled
        reason = f"{why}; by rule: {_without_numbers(workload)}"
        return Answer(plan=ruled.plan, source="default", reason=reason, predicted=self.predict(workload, ruled.plan))

    def worth_trying(self, workload: Workload) -> list[Plan]:
        """What may beat the default, the likeliest first."""
        plans = self._runnable(workload)
        if self.model is None:
            slots = workload.tokens * workload.top_k
            fullest = [n for n in (workload.demand, workload.capacity) if n is not None]
            few = not fullest or min(fullest) * workload.num_experts <= MOST_PADDING * slots
            return [plan for plan in plans if few or plan.layout != "padded"]
        seconds = {plan: self.model.predict(workload, plan).total for plan in plans}
        least = min(seconds.values(), default=0.0)
        return sorted((plan for plan in plans if seconds[plan] <= MOST_SECONDS * least), key=lambda plan: seconds[plan])

    def _runnable(self, workload: Workload) -> list[Plan]:
        return [plan for plan in self.plans(workload) if runnable(plan, workload)]

    def predict(self, workload: Workload, plan: Plan) -> float | None:
        return None if self.model is None else self.model.predict(workload, plan).total

    def _measured(self, found: Found, workload: Workload, ruled: Plan) -> Answer:
        record, exact = found.record, found.tier == "exact"
        best = record.best
        default = next(c for c in record.candidates if c.plan == record.default)
        others = [c for c in record.candidates if c.status == "ok" and c.ratio + c.spread < 1 and c != best]
        chosen, plan = default, default.plan.plan(ruled)
        for candidate in [best, *sorted(others, key=lambda c: c.ratio)]:
            if candidate.plan == record.default or candidate.ratio > 1 - (0.0 if exact else self.margin):
                continue
            if runnable(candidate.plan.plan(ruled), workload):
                chosen, plan = candidate, candidate.plan.plan(ruled)
                break
        gain = f"{chosen.ratio:.2f} of the default's time"
        if chosen is default:
            gain = "nothing beats the default"
            if not exact or not runnable(plan, workload):
                plan = ruled
        return Answer(
            plan=plan,
            source=found.tier,
            reason=f"{gain}; {found.reason}",
            predicted=self.predict(workload, plan),
            measured=chosen.median if exact else None,
            settled=exact,
        )

    def _modelled(self, workload: Workload, ruled: Plan, why: str) -> Answer | None:
        assert self.model is not None
        default = self.model.predict(workload, ruled).total
        best, total = ruled, default
        for plan in self._runnable(workload):
            seconds = self.model.predict(workload, plan).total
            if seconds < total:
                best, total = plan, seconds
        if best == ruled or not total < (1 - MODEL_MARGIN) * default:
            return None
        reason = f"{why}; predicted {total:.2e} s, the default {default:.2e} s"
        return Answer(plan=best, source="model", reason=reason, predicted=total)


def stored(plan: Plan, workload: Workload) -> StoredPlan:
    """As a record has it."""
    return StoredPlan.of(plan, _RULES.plan(workload).plan)


def ruled(workload: Workload) -> Plan:
    return _RULES.plan(workload).plan


def _without_numbers(workload: Workload) -> str:
    """What the rules say of every workload of a bucket."""
    if workload.world > 1:
        return "the degree with the fewest numbers to send"
    if workload.device != "cpu":
        return "what does not wait for the device"
    return "load unknown" if workload.demand is None else "tiles by the fullest expert's rows"
