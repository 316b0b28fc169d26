"""Trying plans in the steps of a real run: turns, rounds, and what is concluded. Nothing here knows torch or a clock.

A turn is one plan's try: the calls between two backward passes, or one call where there are none. A round is a turn of
every plan that is still in question, in an order of its own, so that drift of the machine and the places of layers do
not favour anybody.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median, quantiles

from tutelx.errors import InvalidValueError
from tutelx.tuning.records import Candidate, StoredPlan

Reduce = Callable[[Sequence[float]], list[float]]  # the greatest of all ranks, element by element

LONGEST_TURN = 64  # calls, where nobody runs a backward
_MISSING = -1.0


@dataclass(frozen=True, kw_only=True)
class Exploring:
    """How a bucket is explored that was never measured, and when one is looked at again.

    rounds: that count. warmup: rounds before, which do not.
    most_plans: tried beside the one that would run anyway.
    lost: a plan that took more than this factor of the default's time in each of two rounds is given up.
    margin: share of the time by which a plan must win over the one that runs, and by more than the spread.
    window: calls of a settled bucket between two looks at how long it takes.
    slower: a settled plan whose window took more than this factor of its record is examined again.

    Raises:
        InvalidValueError: a count below 1, a factor that is not above 1, a margin outside [0, 1).
    """

    rounds: int = 5
    warmup: int = 1
    most_plans: int = 12
    lost: float = 1.5
    margin: float = 0.02
    window: int = 64
    slower: float = 1.5

    def __post_init__(self) -> None:
        for name, least in (("rounds", 1), ("warmup", 0), ("most_plans", 1), ("window", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InvalidValueError(f"{name}={value!r} must be an int of at least {least}")
        for name in ("lost", "slower"):
            if not 1 < getattr(self, name) < math.inf:
                raise InvalidValueError(f"{name}={getattr(self, name)!r} must be a finite factor above 1")
        if not 0 <= self.margin < 1:
            raise InvalidValueError(f"margin={self.margin!r} is outside [0, 1)")


class Turn:
    """One plan's try. Times may come late, and from another thread."""

    __slots__ = ("calls", "closed", "index", "plan", "seconds")

    def __init__(self, index: int, plan: StoredPlan) -> None:
        self.index, self.plan = index, plan
        self.calls = 0
        self.closed = False
        self.seconds: list[float] = []

    def observe(self, seconds: float | None) -> None:
        """What one call took; None: its backward has begun, so the next forward belongs to another step."""
        if seconds is None:
            self.closed = True
        else:
            self.seconds.append(seconds)


class Exploration:
    """plans: the default first. incumbent: the one that runs unless another is found to be faster."""

    def __init__(self, plans: Sequence[StoredPlan], setting: Exploring, *, incumbent: int = 0) -> None:
        self.plans, self.setting, self.incumbent = list(plans), setting, incumbent
        self.active = list(range(len(self.plans)))
        self.rows: list[list[float]] = []  # by round that counts: seconds of each plan, _MISSING where there is none
        self.round = 0
        self.turns = self._deal()
        self.at = 0

    @property
    def turn(self) -> Turn:
        return self.turns[self.at]

    def closing(self, *, trains: bool) -> bool:
        """Whether a new call begins a round."""
        return self.at == len(self.turns) - 1 and self._over(trains)

    def ask(self, *, trains: bool, reduce: Reduce) -> Turn | None:
        """The turn that a new call belongs to, None when all is tried. trains: a backward will follow."""
        turn = self.turn
        if self._over(trains):
            self.at += 1
            if self.at == len(self.turns):
                self._close(reduce)
                if self.round == self.setting.warmup + self.setting.rounds or len(self.active) == 1:
                    return None
                self.turns, self.at = self._deal(), 0
            turn = self.turn
        turn.calls += 1
        return turn

    def conclude(self) -> tuple[int, list[Candidate]]:
        """Which plan shall run, and what was measured of all; nothing if the default was never timed."""
        times = [[row[i] for row in self.rows if row[i] > 0] for i in range(len(self.plans))]
        ratios = [[row[i] / row[0] for row in self.rows if row[i] > 0 and row[0] > 0] for i in range(len(self.plans))]
        if not times[0]:
            return self.incumbent, []
        candidates = [
            Candidate(
                plan=plan,
                median=median(times[i]),
                iqr=_iqr(times[i]),
                n=len(times[i]),
                ratio=median(ratios[i]),
                spread=_spread(ratios[i]),
                error=None,
                status="ok" if i in self.active else "slow",
            )
            for i, plan in enumerate(self.plans)
            if ratios[i]
        ]
        by_plan = {candidate.plan: candidate for candidate in candidates}
        own = by_plan.get(self.plans[self.incumbent])
        right = [i for i in self.active if self.plans[i] in by_plan]
        best = min(right, key=lambda i: (by_plan[self.plans[i]].ratio, i != self.incumbent), default=self.incumbent)
        if own is not None and best != self.incumbent:
            found = by_plan[self.plans[best]]
            if found.ratio + max(found.spread, own.spread, self.setting.margin * own.ratio) >= own.ratio:
                best = self.incumbent
        return best, candidates

    def _over(self, trains: bool) -> bool:
        turn = self.turn
        return turn.calls > 0 and (turn.closed or not trains or turn.calls >= LONGEST_TURN)

    def _deal(self) -> list[Turn]:
        order = list(self.active)
        random.Random(self.round).shuffle(order)
        return [Turn(i, self.plans[i]) for i in order]

    def _close(self, reduce: Reduce) -> None:
        row = [_MISSING] * len(self.plans)
        for turn in self.turns:
            times = list(turn.seconds)
            if times:
                row[turn.index] = fmean(times)
        row = list(reduce(row))
        self.round += 1
        if self.round <= self.setting.warmup:
            return
        self.rows.append(row)
        default = [r[0] for r in self.rows]
        for i in self.active[:]:
            seen = [r[i] / d for r, d in zip(self.rows, default) if r[i] > 0 and d > 0]
            if i not in (0, self.incumbent) and len(seen) >= 2 and min(seen) > self.setting.lost:
                self.active.remove(i)


class Watch:
    """Of a settled bucket: whether its plan still takes what its record says."""

    __slots__ = ("calls", "expected", "plan", "seconds", "setting")

    def __init__(self, plan: StoredPlan, expected: float, setting: Exploring) -> None:
        self.plan, self.expected, self.setting = plan, expected, setting
        self.calls = 0
        self.seconds: list[float] = []

    def observe(self, seconds: float | None) -> None:
        if seconds is not None and len(self.seconds) < 4 * self.setting.window:
            self.seconds.append(seconds)

    def ask(self, reduce: Reduce) -> bool:
        """Counts a call; True if the plan shall be examined again."""
        self.calls += 1
        if self.calls < self.setting.window:
            return False
        (seconds,) = reduce([median(self.seconds) if self.seconds else _MISSING])
        self.calls, self.seconds = 0, []
        return seconds > self.setting.slower * self.expected


def _iqr(values: Sequence[float]) -> float:
    if len(values) < 2:
        return 0.0
    first, _, third = quantiles(values, n=4, method="inclusive")
    return third - first


def _spread(ratios: Sequence[float]) -> float:
    """Two standard errors of the median, from the interquartile range as of a normal distribution."""
    return 2 * 0.93 * _iqr(ratios) / math.sqrt(len(ratios)) if ratios else 0.0
