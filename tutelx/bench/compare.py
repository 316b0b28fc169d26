"""Two runs side by side, each against its own yardstick, so that a slower machine is not a slower op."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tutelx.bench.record import Run
from tutelx.errors import InvalidValueError

Key = tuple[str, str, str]


@dataclass(frozen=True, kw_only=True)
class Change:
    """before, now: percent of the yardstick. ratio: how many times slower than before."""

    op: str
    shape: str
    dtype: str
    before: float
    now: float

    @property
    def ratio(self) -> float:
        return self.before / self.now


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """slower: beyond the tolerance, worst first. lost: measured before, failed now.

    unmatched: rows of this run that the other has not measured. notes: what makes the runs less comparable.
    """

    tolerance: float
    changes: tuple[Change, ...]
    lost: tuple[str, ...]
    unmatched: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def slower(self) -> tuple[Change, ...]:
        beyond = [change for change in self.changes if change.ratio > self.tolerance]
        return tuple(sorted(beyond, key=lambda change: -change.ratio))

    @property
    def passed(self) -> bool:
        return not self.slower and not self.lost


def check_tolerance(tolerance: float) -> None:
    if not (tolerance >= 1 and math.isfinite(tolerance)):
        raise InvalidValueError(f"tolerance={tolerance} must be a finite ratio of at least 1")


def compare(now: Run, before: Run, *, tolerance: float) -> Comparison:
    """Rows that only `before` has are no loss: this run may have asked for fewer.

    Raises:
        InvalidValueError: a tolerance below 1; runs without a row in common.
    """
    check_tolerance(tolerance)
    old = {_key(row): row for row in before["rows"] if row["status"] == "ok"}
    changes, lost, unmatched = [], [], []
    for row in now["rows"]:
        key = _key(row)
        if key not in old:
            unmatched.append(" ".join(key))
        elif row["status"] != "ok":
            lost.append(f"{' '.join(key)}: {row['error']}")
        elif row["yardstick"] != old[key]["yardstick"]:
            unmatched.append(f"{' '.join(key)} (yardstick {row['yardstick']}, before {old[key]['yardstick']})")
        else:
            op, shape, dtype = key
            percents = (_percent(old[key]), _percent(row))
            changes.append(Change(op=op, shape=shape, dtype=dtype, before=percents[0], now=percents[1]))
    if not changes and not lost:
        raise InvalidValueError(f"none of {len(now['rows'])} rows is among the {len(old)} measured before")
    return Comparison(
        tolerance=tolerance,
        changes=tuple(changes),
        lost=tuple(lost),
        unmatched=tuple(unmatched),
        notes=_notes(now, before),
    )


def _key(row: dict) -> Key:
    return row["op"], " ".join(f"{name}{value}" for name, value in row["shape"].items()), row["dtype"]


def _percent(row: dict) -> float:
    return row["percent_of_yardstick"]["median"]


def _notes(now: Run, before: Run) -> tuple[str, ...]:
    notes = [
        f"{name}: {now['machine'].get(name)}, before {before['machine'].get(name)}"
        for name in ("device_name", "threads", "last_level_cache", "torch")
        if now["machine"].get(name) != before["machine"].get(name)
    ]
    if not before["complete"]:
        notes.append("the run before was interrupted")
    return tuple(notes)
