"""A trace of needed capacity: read from a file, and run through the cost model."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tutelx.errors import InvalidValueError
from tutelx.tuning.cost.base import CostModel
from tutelx.tuning.cost.question import Question, plans_of
from tutelx.tuning.key import Key
from tutelx.types import Plan

FACTOR, TOKENS = "needed_capacity_factor", "tokens"


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """Predicted seconds of a whole trace. static: of each plan alone, the quickest first.

    The adaptive run has one plan a bucket of the tuning database, the best at the first step that fell into it; it
    changes its plan `switches` times.
    """

    steps: int
    least: float
    most: float
    oracle: float
    adaptive: float
    switches: int
    static: dict[Plan, float]

    def as_json(self) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in ("steps", "least", "most", "oracle", "adaptive", "switches")}
        return {**fields, "static": {str(plan): seconds for plan, seconds in self.static.items()}}


def simulate(steps: list[Question], question: Question, model: CostModel) -> Simulation:
    plans = list(plans_of(question.workload))
    static = dict.fromkeys(plans, 0.0)
    oracle = adaptive = 0.0
    switches, last = 0, None
    chosen: dict[Key, Plan] = {}
    known: dict[Question, dict[Plan, float]] = {}
    for step in steps:
        if step not in known:
            workload = step.workload
            known[step] = {plan: model.predict(workload, plan).total for plan in plans}
        seconds = known[step]
        for plan, each in seconds.items():
            static[plan] += each
        oracle += min(seconds.values())
        plan = chosen.setdefault(Key.of(step.workload), min(plans, key=seconds.__getitem__))
        adaptive += seconds[plan]
        switches += last is not None and plan != last
        last = plan
    factors = [step.capacity for step in steps]
    return Simulation(
        steps=len(steps),
        least=min(factors),
        most=max(factors),
        oracle=oracle,
        adaptive=adaptive,
        switches=switches,
        static=dict(sorted(static.items(), key=lambda each: each[1])),
    )


def read_trace(path: Path, question: Question) -> list[Question]:
    """The question as every step asks it.

    JSON Lines: an object with `needed_capacity_factor` and, if they vary, `tokens`, or a number; lines in which the
    factor is null or 0, as of an empty batch, are left out. CSV: columns of these names, or one column of factors
    without a head.

    Raises:
        InvalidValueError: naming file and line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidValueError(f"{str(path)!r} cannot be read: {error}") from None
    rows = _csv(text) if path.suffix.lower() == ".csv" else _lines(text)
    steps, number = [], 0
    try:
        for at, row in rows:
            number = at
            step = _step(row if isinstance(row, dict) else _object(row), question)
            steps += [] if step is None else [step]
    except (ValueError, TypeError, OverflowError, RecursionError, csv.Error) as error:
        raise InvalidValueError(f"{str(path)!r}, line {number}: {error}") from None
    if not steps:
        raise InvalidValueError(f"{str(path)!r} holds no step with a {FACTOR}")
    return steps


def _step(row: dict[str, Any], question: Question) -> Question | None:
    factor, tokens = row.get(FACTOR), row.get(TOKENS)
    if factor is None or isinstance(factor, bool) or isinstance(tokens, bool):
        if factor is None:
            return None
        raise InvalidValueError(f"{FACTOR}={factor!r} and {TOKENS}={tokens!r} must be numbers")
    tokens = question.tokens if tokens is None else int(tokens)
    if float(factor) == 0 or tokens == 0:
        return None
    return replace(question, capacity=float(factor), tokens=tokens)


def _lines(text: str) -> Iterator[tuple[int, Any]]:
    yield from enumerate(text.splitlines(), 1)


def _object(line: str) -> dict[str, Any]:
    if not line.strip():
        return {}
    value = json.loads(line)
    if isinstance(value, (int, float)):
        return {FACTOR: value}
    if not isinstance(value, dict) or FACTOR not in value:
        raise InvalidValueError(f"neither a number nor an object with {FACTOR}")
    return value


def _csv(text: str) -> Iterator[tuple[int, Any]]:
    rows = csv.reader(text.splitlines())
    head: list[str] | None = None
    for row in rows:
        if not row:
            continue
        if head is None:
            head = [name.strip() for name in row]
            if FACTOR in head:
                continue
            head = [FACTOR]
        named: dict[str, Any] = {name: value.strip() or None for name, value in zip(head, row)}
        yield rows.line_num, named
