"""What to run for a workload, from which tier of knowledge, and why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from tutelx.planner import MOST_PADDING, RulePlanner
from tutelx.tuning.answer import can_run
from tutelx.tuning.cost import CostModel
from tutelx.tuning.key import Key
from tutelx.types import Decision, Plan, Workload

MOST_SECONDS = 2.0  # times the best prediction, of a plan that is tried in a real step

_RULES = RulePlanner()


class Found(Protocol):
    """What a look-up answers; `tutelx.tuning.lookup.Answer` is one."""

    @property
    def plan(self) -> Plan: ...
    @property
    def tier(self) -> str: ...
    @property
    def reason(self) -> str: ...
    @property
    def predicted(self) -> float | None: ...
    @property
    def measured(self) -> float | None: ...


class Lookup(Protocol):
    """Finds the plan for a key; `tutelx.tuning.lookup.Lookup` is one. rule: what the rules choose."""

    def find(self, key: Key, workload: Workload, rule: Decision) -> Found: ...


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

    def decision(self, workload: Workload) -> Decision:
        return Decision(
            plan=self.plan,
            source=self.source,
            reason=self.reason,
            workload=workload,
            predicted_seconds=self.predicted,
            measured_seconds=self.measured,
        )


class Knowledge:
    """lookup: what was measured; None: nothing. model: what a plan should take, if its rates are known.

    plans: those that a workload can run, the default first.
    """

    def __init__(
        self,
        lookup: Lookup | None = None,
        model: CostModel | None = None,
        *,
        plans: Callable[[Workload], Sequence[Plan]],
    ) -> None:
        self.lookup, self.model, self._plans = lookup, model, plans

    def answer(self, workload: Workload) -> Answer:
        """From the look-up, if it knows a plan that can run here; else the rules'."""
        rule = _RULES.plan(workload)
        why = "nothing was measured"
        if self.lookup is not None:
            found = self.lookup.find(Key.of(workload), workload, rule)
            if found.plan == rule.plan or can_run(found.plan, workload):
                return Answer(
                    plan=found.plan,
                    source=found.tier,
                    reason=found.reason,
                    predicted=found.predicted,
                    measured=found.measured,
                    settled=found.tier == "exact",
                )
            why = f"{found.plan} was found ({found.tier}) and cannot run here"
        return Answer(plan=rule.plan, source="default", reason=f"the rules' plan: {why}")

    def predict(self, workload: Workload, plan: Plan) -> float | None:
        return None if self.model is None else self.model.predict(workload, plan).total

    def worth_trying(self, workload: Workload) -> list[Plan]:
        """What may beat the default, the likeliest first."""
        plans = [plan for plan in self._plans(workload) if can_run(plan, workload)]
        if self.model is None:
            slots = workload.tokens * workload.top_k
            fullest = [n for n in (workload.demand, workload.capacity) if n is not None]
            few = not fullest or min(fullest) * workload.num_experts <= MOST_PADDING * slots
            return [plan for plan in plans if few or plan.layout != "padded"]
        seconds = {plan: self.model.predict(workload, plan).total for plan in plans}
        least = min(seconds.values(), default=0.0)
        return sorted((plan for plan in plans if seconds[plan] <= MOST_SECONDS * least), key=lambda plan: seconds[plan])


def ruled(workload: Workload) -> Plan:
    return _RULES.plan(workload).plan
