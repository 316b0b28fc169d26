"""The answer of a cost model, and what is asked of one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from tutelx.types import Plan, Workload


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Predicted seconds of one call.

    total: with what overlaps counted once; without chunks the sum of the parts.
    compute: products of the gate and the experts. exchange: rows there and back. weights: gathered, and their
    gradients sent home. memory: passes over rows that are no products.
    """

    total: float
    compute: float
    exchange: float
    weights: float
    memory: float


class CostModel(Protocol):
    """Predicts; must be the same on all ranks and quick: about 50 microseconds a plan."""

    def predict(self, workload: Workload, plan: Plan) -> Cost: ...
