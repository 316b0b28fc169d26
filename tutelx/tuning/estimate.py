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
_LOG_UNTIMED = math.log(UNTIMED)


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

    log_ratio: log of its time over the default's; spread: how far it may be off, by the measurements alone.
    seconds: of a call; None if no neighbour has timed it. keys: neighbours that have.
    """

    plan: StoredPlan
    log_ratio: float
    spread: float
    seconds: float | None
    keys: int
    wrong: bool = False

    @property
    def ratio(self) -> float:
        return math.exp(self.log_ratio)


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
    key: Key, around: Sequence[Neighbour], default: StoredPlan, wrong: Collection[StoredPlan] = ()
) -> dict[StoredPlan, Estimate]:
    """Of every plan that a neighbour has timed or found wrong, its tile told relative to the rules'.

    A neighbour that has not timed a plan did not find it worth that: it counts as UNTIMED times its default. One that
    has not timed `default` either tells nothing of the two.

    wrong: plans that others have found wrong.
    """
    timed = [(each, each.candidates()) for each in around]
    plans = sorted({each.told(plan) for each in around for plan in each.record.by_plan}, key=lambda plan: plan.order)

    def untimed(each: Neighbour, candidates: dict[StoredPlan, Candidate]) -> float:
        return _LOG_UNTIMED if each.seen(default) in candidates else _unbeaten(each, candidates)

    return {plan: _estimate(key, plan, timed, wrong=plan in wrong, untimed=untimed) for plan in plans}


def estimate_default(key: Key, around: Sequence[Neighbour], default: StoredPlan) -> Estimate:
    """Of the plan that is to be beaten. A neighbour that has not timed it counts as if nothing beat it there."""
    timed = [(each, each.candidates()) for each in around]
    return _estimate(key, default, timed, wrong=False, untimed=_unbeaten)


def _unbeaten(each: Neighbour, candidates: dict[StoredPlan, Candidate]) -> float:
    return math.log(each.record.best.ratio)


def _estimate(
    key: Key,
    plan: StoredPlan,
    around: Sequence[tuple[Neighbour, dict[StoredPlan, Candidate]]],
    *,
    wrong: bool,
    untimed: Callable[[Neighbour, dict[StoredPlan, Candidate]], float],
) -> Estimate:
    log_ratio, variance = 0.0, 0.0
    timed: list[tuple[float, float, float]] = []  # weight, log of the work, log of the seconds
    for each, candidates in around:
        candidate = candidates.get(each.seen(plan))
        if candidate is None or not candidate.n:
            wrong = wrong or candidate is not None
            log_ratio += each.weight * untimed(each, candidates)
            continue
        wrong = wrong or (candidate.status == "wrong" and candidate.plan != each.record.default)
        log_ratio += each.weight * math.log(candidate.ratio)
        variance += (each.weight * math.log1p(candidate.spread)) ** 2
        timed.append((each.weight, _work(each.record.key), math.log(candidate.median)))
    # Rounded, so that another processor's logarithm does not choose another plan.
    return Estimate(
        plan=plan,
        log_ratio=round(log_ratio, 9),
        spread=round(math.sqrt(variance), 9),
        seconds=math.exp(_at(_work(key), timed)) if timed else None,
        keys=len(timed),
        wrong=wrong,
    )


def _at(work: float, timed: Sequence[tuple[float, float, float]]) -> float:
    """Log of the seconds: the mean, each carried to this work along the slope between the least and the most work,
    which is taken for 1 where there is one only, and never for more."""
    least, most = min(timed, key=lambda t: t[1]), max(timed, key=lambda t: t[1])
    slope = 1.0
    if most[1] > least[1]:
        slope = min(max((most[2] - least[2]) / (most[1] - least[1]), 0.0), 1.0)
    total = sum(weight for weight, _, _ in timed)
    return sum(weight * (seconds + slope * (work - at)) for weight, at, seconds in timed) / total


def _work(key: Key) -> float:
    """Log of the multiplications of one matrix of each slot."""
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
