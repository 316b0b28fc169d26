"""Which plan to run: what was measured for this key, near it, on a sibling machine; a model; else the default."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from tutelx.errors import InvalidValueError
from tutelx.tuning import strict
from tutelx.tuning.answer import TIERS, Answer, Considered, Tier, Tried, choose
from tutelx.tuning.cost import CostModel, from_hardware, workload_of
from tutelx.tuning.estimate import Neighbour, Trend, estimates, neighbours
from tutelx.tuning.hardware import Hardware
from tutelx.tuning.key import Key
from tutelx.tuning.parse import from_line, to_line
from tutelx.tuning.records import StoredPlan
from tutelx.tuning.shelves import Shelf, Shelves, shelves
from tutelx.tuning.space import is_legal, legal_plans
from tutelx.tuning.store import Database, Stored
from tutelx.tuning.tiles import of_rules, relative
from tutelx.types import Decision, Plan, Workload

NEAREST_CAP = 3.0  # octaves to the nearest measured key
BRACKET_CAP = 5.0  # octaves to the others that bracket
LEAST_GAIN = 0.01  # of the default's time, for a plan that was not measured for this very key, ...
GAIN_AN_OCTAVE = 0.01  # ... and more the farther the nearest key is, in keys and in hardware
MODEL_GAIN = 0.2  # of the default's time, for a plan that was only predicted


class Lookup:
    """What a database knows for one machine.

    The same database, machine and workload give the same answer on every rank; `to_json` carries one rank's knowledge
    to the others.

    Args:
        database: of all layers.
        hardware: the machine that asks.
        cost_model: of that machine, for what nothing near was measured; None: not asked.
        software: versions here, by name; records of other versions count less, and answers say so.
    """

    def __init__(
        self,
        database: Database,
        hardware: Hardware,
        cost_model: CostModel | None = None,
        *,
        software: Mapping[str, str] | None = None,
    ) -> None:
        self.database, self.hardware, self.cost_model = database, hardware, cost_model
        self.software = dict(software or {})
        self._by_sheet = from_hardware(hardware)
        self._shelves: dict[tuple, Shelves] = {}
        self._seen: tuple[int, Hardware] | None = None

    def find(self, key: Key, workload: Workload, rule: Decision | Plan) -> Answer:
        """The plan to run. About a millisecond.

        Args:
            key: the workload's.
            rule: what the rules choose for it, the default.
        """
        tried: list[Tried] = []
        for tier in TIERS[:-1]:
            found = self.ask(tier, key, workload, rule)
            if isinstance(found, Answer):
                return replace(found, tried=tuple(tried))
            tried.append(found)
        default = self.ask("default", key, workload, rule)
        assert isinstance(default, Answer)
        return replace(default, reason=f"{default.reason}: {tried[1].reason}", tried=tuple(tried))

    def ask(self, tier: Tier, key: Key, workload: Workload, rule: Decision | Plan) -> Answer | Tried:
        """One tier alone."""
        default = rule.plan if isinstance(rule, Decision) else rule
        at_hand = self._at_hand(key)
        if tier == "exact":
            return self._exact(at_hand.own, key, workload, default)
        if tier == "nearest":
            return self._nearest(at_hand.own, key, workload, default)
        if tier == "sibling":
            return self._sibling(at_hand.siblings, key, workload, default)
        if tier == "model":
            return self._modelled(workload, default)
        return Answer(
            plan=default, tier="default", reason="the rules' plan", predicted=self._by_model(workload, default)
        )

    def predict(self, key: Key, workload: Workload, plan: Plan, rule: Decision | Plan | None = None) -> float | None:
        """Seconds of a call with this plan, from what was measured, else from the cost model; None if neither knows.

        rule: what the rules choose; tiles that are the rules' own were stored as such.
        """
        by_rule = rule.plan if isinstance(rule, Decision) else rule
        shelf = self._at_hand(key).own
        if shelf is not None:
            found = estimates(key, self._around(shelf, key), StoredPlan.of(plan, by_rule), trend=self._trend(key))
            forms = [StoredPlan.of(plan)]
            if by_rule is not None:
                forms.insert(0, StoredPlan.of(plan, by_rule))
                forms.append(relative(forms[1], of_rules(key)))
            for estimate in filter(None, map(found.get, forms)):
                if estimate.seconds is not None:
                    return estimate.seconds
        return self._by_model(workload, plan)

    def relevant(self, kind: tuple) -> Lookup:
        """What answers about keys of one kind (`Key.kind`), without the rest."""
        stored = [each for each in self.database.records() if self._is_of(each, kind)]
        return self._with(stored)

    def to_json(self) -> str:
        """All records and the machine; not the cost model."""
        records = [
            {"layer": s.layer, "rank": s.rank, "record": to_line(s.record).decode("ascii")}
            for s in self.database.records()
        ]
        return json.dumps({"hardware": self.hardware.to_json(), "software": self.software, "records": records})

    @classmethod
    def from_json(cls, text: str, cost_model: CostModel | None = None) -> Lookup:
        """Raises InvalidValueError if it was not made by `to_json`."""
        try:
            value = json.loads(text)
            stored = [
                Stored(
                    record=from_line(each["record"].encode("ascii")), layer=str(each["layer"]), rank=int(each["rank"])
                )
                for each in value["records"]
            ]
            software = strict.texts(value["software"], "software")
            hardware = Hardware.from_json(value["hardware"])
        except InvalidValueError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InvalidValueError(f"no snapshot of a look-up: {type(error).__name__}: {str(error)[:80]}") from None
        return cls(Database.of_stored(stored), hardware, cost_model, software=software)

    def _with(self, stored: Sequence[Stored]) -> Lookup:
        return Lookup(Database.of_stored(stored), self.hardware, self.cost_model, software=self.software)

    def _is_of(self, stored: Stored, kind: tuple) -> bool:
        found = shelves([stored], self.hardware, self.software)
        return kind in found

    def _at_hand(self, key: Key) -> Shelves:
        if self._seen != (self.database.version, self.hardware):
            records = [stored for stored in self.database.records() if stored.record.op == "layer"]
            self._shelves = shelves(records, self.hardware, self.software)
            self._seen = (self.database.version, self.hardware)
        return self._shelves.get(key.kind, Shelves(own=None, siblings=()))

    def _exact(self, shelf: Shelf | None, key: Key, workload: Workload, default: Plan) -> Answer | Tried:
        record = None if shelf is None else shelf.records.get(key)
        if shelf is None or record is None:
            return Tried(tier="exact", reason="this key was not measured here")
        alone = [Neighbour(key=key, record=record, weight=1.0, distance=0.0)]
        return choose("exact", shelf, key, alone, workload, default, margin=0.0)

    def _nearest(self, shelf: Shelf | None, key: Key, workload: Workload, default: Plan) -> Answer | Tried:
        if shelf is None:
            return Tried(tier="nearest", reason="nothing of this kind was measured on such a machine")
        around = self._around(shelf, key)
        if not around:
            return Tried(tier="nearest", reason=_too_far(key, shelf))
        margin = LEAST_GAIN + GAIN_AN_OCTAVE * around[0].distance
        wrong = shelf.wrong_near(key, BRACKET_CAP)
        return choose(
            "nearest", shelf, key, around, workload, default, margin=margin, trend=self._trend(key), wrong=wrong
        )

    def _sibling(self, siblings: Sequence[Shelf], key: Key, workload: Workload, default: Plan) -> Answer | Tried:
        reason = "no sibling machine has measured this kind"
        for shelf in siblings:
            around = self._around(shelf, key)
            if around:
                margin = LEAST_GAIN + GAIN_AN_OCTAVE * (around[0].distance + shelf.distance)
                wrong = shelf.wrong_near(key, BRACKET_CAP)
                return choose(
                    "sibling", shelf, key, around, workload, default, margin=margin, trend=self._trend(key), wrong=wrong
                )
            reason = f"{shelf.name}: {_too_far(key, shelf)}"
        return Tried(tier="sibling", reason=reason)

    def _modelled(self, workload: Workload, default: Plan) -> Answer | Tried:
        if self.cost_model is None:
            return Tried(tier="model", reason="there is no cost model of this machine")
        if not is_legal(default, workload):
            return Tried(tier="model", reason=f"the default {default} is none that the workload can run")
        plans = legal_plans(workload, default=default)
        seconds = {plan: self.cost_model.predict(workload, plan).total for plan in plans}
        known = [plan for plan in plans if math.isfinite(seconds[plan]) and seconds[plan] > 0]
        best = min(known, key=lambda plan: seconds[plan], default=default)
        if default not in known or seconds[best] > (1 - MODEL_GAIN) * seconds[default]:
            reason = f"no plan is predicted to take {MODEL_GAIN:.0%} less than the default"
            return Tried(tier="model", reason=reason)
        reason = f"predicted {seconds[best]:.3g} s, the default {seconds[default]:.3g} s"
        considered = tuple(
            Considered(
                plan=StoredPlan.of(plan, default),
                ratio=seconds[plan] / seconds[default],
                predicted=seconds[plan],
                verdict="" if plan == best else "predicted to take longer",
            )
            for plan in sorted(known, key=lambda plan: seconds[plan])
        )
        return Answer(plan=best, tier="model", reason=reason, predicted=seconds[best], considered=considered)

    def _trend(self, key: Key) -> Trend | None:
        """Over ranks plans send different things, which the cost model counts; on one process they differ by factors
        that the measurements tell better."""
        if key.world == 1:
            return None
        model = self.cost_model or self._by_sheet

        def predicted(at: Key, plan: StoredPlan) -> float:
            total = model.predict(workload_of(at), plan.plan(Plan())).total
            return math.log(total) if 0 < total < math.inf else 0.0

        return predicted

    def _around(self, shelf: Shelf, key: Key) -> list[Neighbour]:
        """Measured by these versions, if any of those is near enough, else by any."""
        caps = {"nearest": NEAREST_CAP, "farthest": BRACKET_CAP}
        return neighbours(key, shelf.fresh, **caps) or neighbours(key, shelf.records.items(), **caps)

    def _by_model(self, workload: Workload, plan: Plan) -> float | None:
        seconds = math.nan if self.cost_model is None else self.cost_model.predict(workload, plan).total
        return seconds if math.isfinite(seconds) else None


def _too_far(key: Key, shelf: Shelf) -> str:
    least = min(key.distance(other) for other in shelf.records)
    return f"the nearest measured key is {least:.2g} octaves away, more than {NEAREST_CAP:g}"
