"""What plans should take for a key that was not measured, from the measured keys around it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from tutelx.tuning.key import Key
from tutelx.tuning.records import Candidate, Record, StoredPlan
from tutelx.tuning.tiles import Tiles, absolute, of_rules, relative

MOST_NEIGHBOURS = 8
UNTIMED = 1.5
UNSEEN = 0.1  # how far the trend alone may be off, as a logarithm
_LOG_UNTIMED = math.log(UNTIMED)

# Log of what a plan should take, but for a factor that is the same at all keys.
Trend = Callable[[Key, StoredPlan], float]


@dataclass(frozen=True, kw_only=True)
class Neighbour:
    """A measured key near the one that is asked for. weight: of all neighbours, 1. distance: in octaves.

    tiles: of the rules, for the key; plans are compared relative to them. None: for this very key, as they were stored.
    """

    key: Key
    record: Record
    weight: float
    distance: float
    tiles: Tiles | None = None

    def candidates(self) -> dict[StoredPlan, Candidate]:
        """By plan, with the tile in numbers."""
        return {self.seen(candidate.plan): candidate for candidate in self.record.candidates}

    def told(self, plan: StoredPlan) -> StoredPlan:
        return plan if self.tiles is None else relative(plan, self.tiles)

    def seen(self, plan: StoredPlan) -> StoredPlan:
        return plan if self.tiles is None else absolute(plan, self.tiles)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What is expected of a plan.

    log_seconds: log of the seconds of a call, by which plans are compared. spread: how far it may be off.
    seconds: of a call, by those neighbours alone that have timed the plan; None if none has. keys: how many have.
    """

    plan: StoredPlan
    log_seconds: float
    spread: float
    seconds: float | None
    keys: int
    wrong: bool = False


def neighbours(key: Key, records: Iterable[tuple[Key, Record]], *, nearest: float, farthest: float) -> list[Neighbour]:
    """Measured keys that bracket `key`: of those that lie behind one another, as seen from it, the first.

    They weigh as in multilinear interpolation of the logarithms of the sizes: an axis with a key on each side, a and b
    octaves away, gives the first b/(a+b); with keys on one side only, 2**-a.

    Args:
        records: with the keys they are to count for, which may differ from their own in threads.
        nearest, farthest: octaves, within which the nearest and the others must lie.
    """
    around = sorted(
        ((distance, k, record) for k, record in records if (distance := key.distance(k)) <= farthest),
        key=lambda each: (each[0], _coordinates(each[1])),
    )
    if not around or around[0][0] > nearest:
        return []
    x = _coordinates(key)
    chosen: list[tuple[float, tuple[float, ...], Key, Record]] = []
    for distance, k, record in around:
        offset = tuple(b - a for a, b in zip(x, _coordinates(k)))
        if not any(_lies_between(nearer, offset) for _, nearer, _, _ in chosen):
            chosen.append((distance, offset, k, record))
        if len(chosen) == MOST_NEIGHBOURS:
            break
    weights = _weights([offset for _, offset, _, _ in chosen])
    return [
        Neighbour(key=k, record=r, weight=w, distance=d, tiles=of_rules(k))
        for w, (d, _, k, r) in zip(weights, chosen)
        if w > 0
    ]


def estimates(
    key: Key,
    around: Sequence[Neighbour],
    default: StoredPlan,
    wrong: Collection[StoredPlan] = (),
    trend: Trend | None = None,
) -> dict[StoredPlan, Estimate]:
    """Of every plan that a neighbour has timed or found wrong, its tile told relative to the rules'.

    A plan's time is the trend's at the key, times the weighted mean (of logarithms) of what its measured times are over
    the trend's at the neighbours. So a plan that is best on one side of a crossover, and was not worth a measurement on
    the other, is followed across it. Without a trend all plans follow the work, and a neighbour that has not timed a
    plan did not find it worth that: it counts as UNTIMED times its default. One that has not timed `default` either
    tells nothing of the two.

    wrong: plans that others have found wrong.
    """
    timed = [(each, each.candidates()) for each in around]
    plans = sorted({each.told(plan) for each in around for plan in each.record.by_plan}, key=lambda plan: plan.order)

    def untimed(each: Neighbour, candidates: dict[StoredPlan, Candidate]) -> float:
        return _LOG_UNTIMED if each.seen(default) in candidates else _unbeaten(each, candidates)

    return {
        plan: _estimate(key, plan, timed, trend, wrong=plan in wrong, untimed=untimed if trend is None else None)
        for plan in plans
    }


def estimate_default(
    key: Key, around: Sequence[Neighbour], default: StoredPlan, trend: Trend | None = None
) -> Estimate:
    """Of the plan that is to be beaten. A neighbour that has not timed it counts as if nothing beat it there; with a
    trend it counts only if no neighbour has."""
    timed = [(each, each.candidates()) for each in around]
    return _estimate(key, default, timed, trend, wrong=False, untimed=_unbeaten if trend is None else None)


def _unbeaten(each: Neighbour, candidates: dict[StoredPlan, Candidate]) -> float:
    return math.log(each.record.best.ratio)


def _estimate(
    key: Key,
    plan: StoredPlan,
    around: Sequence[tuple[Neighbour, dict[StoredPlan, Candidate]]],
    trend: Trend | None,
    *,
    wrong: bool,
    untimed: Callable[[Neighbour, dict[StoredPlan, Candidate]], float] | None,
) -> Estimate:
    follow = trend or _by_work
    here = follow(key, plan)
    timed, guessed = _Mean(), _Mean()
    variance, keys = 0.0, 0
    for each, candidates in around:
        candidate = candidates.get(each.seen(plan))
        off = _default_seconds(each.record) - follow(each.key, plan)
        if candidate is None or not candidate.n:
            wrong = wrong or candidate is not None
            if untimed is not None:
                guessed.add(each.weight, untimed(each, candidates) + off)
            continue
        wrong = wrong or (candidate.status == "wrong" and candidate.plan != each.record.default)
        variance += (each.weight * math.log1p(candidate.spread)) ** 2
        timed.add(each.weight, math.log(candidate.ratio) + off)
        keys += 1
    both = timed.with_(guessed)
    spread = math.sqrt(variance)
    if untimed is None:
        spread = spread / max(timed.weight, 1e-9) + UNSEEN * (1 - min(1.0, timed.weight))
    if not both.weight:
        both, spread = _of_others(around, follow), UNSEEN
    # Rounded, so that another processor's logarithm does not choose another plan.
    return Estimate(
        plan=plan,
        log_seconds=round(here + both.value, 9),
        spread=round(spread, 9),
        seconds=math.exp(here + timed.value) if keys else None,
        keys=keys,
        wrong=wrong,
    )


@dataclass
class _Mean:
    weight: float = 0.0
    total: float = 0.0

    def add(self, weight: float, value: float) -> None:
        self.weight += weight
        self.total += weight * value

    def with_(self, other: _Mean) -> _Mean:
        return _Mean(self.weight + other.weight, self.total + other.total)

    @property
    def value(self) -> float:
        return self.total / self.weight if self.weight else 0.0


def _of_others(around: Sequence[tuple[Neighbour, dict[StoredPlan, Candidate]]], follow: Trend) -> _Mean:
    """How far off the trend is for the plans that were timed."""
    mean = _Mean()
    for each, candidates in around:
        for plan, candidate in candidates.items():
            if candidate.n:
                seconds = _default_seconds(each.record) + math.log(candidate.ratio)
                mean.add(each.weight / len(candidates), seconds - follow(each.key, plan))
    return mean


def _default_seconds(record: Record) -> float:
    """Log of what ratios are ratios to."""
    default = record.by_plan[record.default]
    return math.log(default.median) if default.n else 0.0


def _by_work(key: Key, plan: StoredPlan) -> float:
    """The same for all plans: log of the multiplications of one matrix of each slot."""
    return sum(math.log(max(size, 1)) for size in (key.tokens, key.top_k, key.model_dim, key.hidden_dim))


def _coordinates(key: Key) -> tuple[float, ...]:
    sizes = (key.tokens, key.top_k, key.load_factor, key.num_experts, key.model_dim, key.hidden_dim)
    return tuple(math.log2(max(size, 0.5)) for size in sizes)


def _lies_between(nearer: Sequence[float], offset: Sequence[float]) -> bool:
    """On each axis between the origin and `offset`."""
    return all(a * b >= 0 and abs(a) <= abs(b) + 1e-9 for a, b in zip(nearer, offset))


def _weights(offsets: Sequence[Sequence[float]]) -> list[float]:
    products = [1.0] * len(offsets)
    for axis in range(len(offsets[0])):
        values = [offset[axis] for offset in offsets]
        below = min((-v for v in values if v < 0), default=None)
        above = min((v for v in values if v > 0), default=None)
        for i, value in enumerate(values):
            other = above if value < 0 else below
            if value and other is not None:
                products[i] *= other / (abs(value) + other)
            elif value:
                products[i] *= 2.0 ** -abs(value)
    total = sum(products)
    return [product / total for product in products]
