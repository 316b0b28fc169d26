"""Which of several plans is fastest, in as few turns as it takes: a race against the default.

One turn times every plan that still runs, the default among them, in an order drawn anew, as a call is slower behind
one that has swept the caches. A plan's ratio is the median over the turns of its time over the default's in the same
turn, so that a slow moment of the machine, which falls on both, cancels. What cannot win leaves the race (racing, Maron
and Moore 1994), and the turns that it would have taken are spent on those that can.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

LEAST_TURNS = 5  # of a plan that is not stopped early, whatever the time
STOPPED_AFTER = 3  # turns before a plan's spread is believed
MOST_TURNS = 100
HOPELESS, HOPELESS_AFTER = 1.5, 2  # times the best in each of so many turns: no spread explains it
RESOLUTION = 0.01  # of a ratio: what is not worth a turn
_CAUTION = 1.25  # times the spread: a plan is looked at after every turn, and must not be unlucky in any
_TO_SIGMA = 1 / 1.349  # of a normal distribution: standard deviation over the distance of its quartiles
_OF_MEDIAN = 1.2533  # standard error of its median over that of its mean


@dataclass(kw_only=True)
class Runner:
    """One plan. seconds: of each turn. ratios: over the default's, in the same turns."""

    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    stopped: bool = False

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def iqr(self) -> float:
        return quartile_distance(self.seconds)

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def spread(self) -> float:
        """Two standard errors of the ratio, more where a few turns tell little of the quartiles; infinite before the
        third turn."""
        n = len(self.ratios)
        if n < STOPPED_AFTER:
            return math.inf
        few = 1 + 2 / (n - 1)
        return 2 * few * _OF_MEDIAN * _TO_SIGMA * quartile_distance(self.ratios) / math.sqrt(n)


class Race:
    """Runner 0 is the default; it stays to the end, as the others are timed against it.

    seconds: about how long the race takes; more only for the least turns.
    """

    def __init__(self, number: int, *, seconds: float, seed: int = 0) -> None:
        self.runners = [Runner() for _ in range(number)]
        self.turns, self._seconds = 0, seconds
        self._draw = random.Random(seed)

    def order(self) -> list[int]:
        """Who is timed in the next turn, in this order; the same for equal histories."""
        running = [i for i, runner in enumerate(self.runners) if not runner.stopped]
        self._draw.shuffle(running)
        return running

    def add(self, turn: dict[int, float]) -> None:
        """The seconds of those that `order` named."""
        self.turns += 1
        base = turn[0]
        for i, seconds in turn.items():
            self.runners[i].seconds.append(seconds)
            self.runners[i].ratios.append(seconds / base)
        self._stop_losers()

    def stop(self, i: int, seconds: float, base: float) -> None:
        """Ends the race for one before its first turn, on its best time so far and the default's."""
        self.runners[i] = Runner(seconds=[seconds], ratios=[seconds / base], stopped=True)

    def over(self, elapsed: float) -> bool:
        """Whether enough is known, or the time is up. elapsed: seconds since the start, the same on all ranks."""
        if self.turns >= MOST_TURNS:
            return True
        if self.turns < LEAST_TURNS:
            return False
        others = [runner for runner in self.runners[1:] if not runner.stopped]
        return elapsed >= self._seconds or all(runner.spread <= RESOLUTION for runner in others)

    def _stop_losers(self) -> None:
        running = [runner for runner in self.runners if not runner.stopped]
        best = min(runner.ratio for runner in running)
        # Of a few turns the quartiles may lie close by luck: no plan is steadier than most.
        steady = max(RESOLUTION, _CAUTION * statistics.median(runner.spread for runner in running[1:] or running))
        spreads = [max(steady, _CAUTION * runner.spread) for runner in running]
        # What the best takes at worst.
        worst = min(runner.ratio + spread for runner, spread in zip(running, spreads))
        for runner, spread in zip(running, spreads):
            if runner is self.runners[0]:
                continue
            surely = self.turns >= STOPPED_AFTER and runner.ratio - spread > worst
            if surely or (self.turns >= HOPELESS_AFTER and min(runner.ratios) > HOPELESS * best):
                runner.stopped = True


def quartile_distance(values: Sequence[float]) -> float:
    if len(values) < 2:
        return 0.0
    q1, _, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return q3 - q1
