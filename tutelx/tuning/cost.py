"""What a plan should take, from the rates of a machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from tutelx.types import Plan, Workload


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Predicted seconds of one call. total: with what overlaps counted once."""

    total: float
    compute: float
    exchange: float
    weights: float
    memory: float


class CostModel(Protocol):
    """Predicts; must be the same on all ranks and quick: about 50 microseconds a plan."""

    def predict(self, workload: Workload, plan: Plan) -> Cost: ...
