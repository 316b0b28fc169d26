"""Rates fitted to what the database measured."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING

from tutelx.tuning.cost.model import RateModel
from tutelx.tuning.cost.sheets import Link, Sheet
from tutelx.tuning.key import Key
from tutelx.tuning.records import Record
from tutelx.types import Plan, Workload

if TYPE_CHECKING:
    import numpy as np

MOST_TIMINGS = 400  # as many are spread over the records; more would only take longer
_STEPS, _LONGEST_STEP, _CLOSE = 30, 1.0, 0.3
_PRIOR = 0.003  # weight of staying at the base, for rates that no timing depends on


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What calibration found.

    sheet: with the fitted rates. timings: how many were used.
    before, after: mean over them of |ln(predicted / measured)|, with the base and with the fitted sheet.
    """

    sheet: Sheet
    timings: int
    before: float
    after: float

    def __str__(self) -> str:
        before, after = math.expm1(self.before), math.expm1(self.after)
        return f"{self.timings} timings, off by {after:.0%} on average ({before:.0%} before)"


def calibrate(records: Iterable[Record], base: Sheet) -> Fit:
    """Fits the sheet's rates to the timings of `records`, which should be of one machine.

    Least squares on the logarithm of time, Huber's weights beyond 30 percent, by Gauss-Newton from the base; the factor
    of each rate is drawn to 1, so that one that nothing depends on keeps its base. The same records, in the same order,
    give the same sheet. Wrong candidates and those of another device are left out; with none left, the base comes back.
    """
    timings = _timings(records, base)
    if not timings:
        return Fit(sheet=base, timings=0, before=0.0, after=0.0)
    import numpy as np

    def residuals(factors: np.ndarray) -> np.ndarray:
        model = RateModel(_scaled(base, factors))
        return np.array([math.log(model.predict(w, plan).total / seconds) for w, plan, seconds in timings])

    def loss(r: np.ndarray, x: np.ndarray) -> float:
        size = np.abs(r)
        huber = np.where(size <= _CLOSE, 0.5 * size**2, _CLOSE * (size - 0.5 * _CLOSE))
        return float(huber.sum() + 0.5 * _PRIOR * (x**2).sum())

    x = np.zeros(_FACTORS)
    first = r = residuals(x)
    for _ in range(_STEPS):
        slopes = np.stack([(residuals(x + step) - r) / 1e-4 for step in np.eye(_FACTORS) * 1e-4], axis=1)
        weight = np.minimum(1.0, _CLOSE / np.maximum(np.abs(r), 1e-12))
        normal = slopes.T @ (slopes * weight[:, None]) + _PRIOR * np.eye(_FACTORS)
        step = np.clip(np.linalg.solve(normal, -(slopes.T @ (weight * r) + _PRIOR * x)), -_LONGEST_STEP, _LONGEST_STEP)
        for shorter in (1.0, 0.5, 0.2, 0.05, 0.01):
            tried = x + shorter * step
            there = residuals(tried)
            if loss(there, tried) < loss(r, x):
                x, r = tried, there
                break
        else:
            break
    fitted = _scaled(base, x)
    fitted = replace(fitted, source=f"{base.source}; rates fitted to {len(timings)} timings")
    return Fit(
        sheet=fitted, timings=len(timings), before=fmean(map(abs, first.tolist())), after=fmean(map(abs, r.tolist()))
    )


def workload_of(key: Key) -> Workload:
    """A workload of the key's bucket; unknown loads are even."""
    W, E = key.world, key.num_experts
    s = W // E if W > E and W % E == 0 else 1
    found = key.workload(shard_degrees=(0, *(r for r in range(1, s + 1) if s % r == 0)) if W > 1 else (1,))
    return found if found.demand is not None else replace(found, demand=math.ceil(key.tokens * key.top_k / E))


_FACTORS = 9


def _scaled(base: Sheet, factors: np.ndarray) -> Sheet:
    """factors: logarithms of what each rate and overhead is multiplied with."""
    products, half, memory, start, chunk, intra, intra_latency, inter, inter_latency = (
        math.exp(min(max(float(x), -12.0), 12.0)) for x in factors
    )

    def link(of: Link, rate: float, latency: float) -> Link:
        return replace(of, rate=of.rate * rate, latency=of.latency * latency)

    return replace(
        base,
        products={dtype: rate * products for dtype, rate in base.products.items()},
        half_rows=base.half_rows * half,
        memory_rate=base.memory_rate * memory,
        start=base.start * start,
        chunk_start=base.chunk_start * chunk,
        intra=link(base.intra, intra, intra_latency),
        inter=link(base.inter, inter, inter_latency),
    )


def _timings(records: Iterable[Record], base: Sheet) -> list[tuple[Workload, Plan, float]]:
    found = []
    for record in records:
        if record.op != "layer" or record.hardware.device != base.device or record.key.tokens < 1:
            continue
        workload = workload_of(record.key)
        for candidate in record.candidates:
            if candidate.status == "ok" and 0 < candidate.median < math.inf:
                found.append((workload, candidate.plan.plan(Plan()), candidate.median))
    step = -(-len(found) // MOST_TIMINGS)
    return found[:: max(1, step)]
