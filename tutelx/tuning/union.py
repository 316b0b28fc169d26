"""Many records as one set: a union that does not care for order, grouping or repetition.

It is over (op, hardware, key, default, software, plan). Of two timings of one plan the one with more turns stays.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable
from dataclasses import replace

from packaging.version import InvalidVersion, Version

from tutelx.tuning.parse import to_line
from tutelx.tuning.records import Candidate, Record

Identity = tuple[Hashable, ...]

_COMPARED = ("tutelx", "torch", "cuda")


def identity(record: Record) -> Identity:
    """What two records share that are one."""
    software = tuple(sorted(record.software.items()))
    return (record.schema, record.op, record.hardware, record.key, record.default, software)


def union(records: Iterable[Record]) -> list[Record]:
    """Commutative, associative and idempotent; in a fixed order."""
    groups: dict[Identity, list[Record]] = defaultdict(list)
    for record in records:
        groups[identity(record)].append(record)
    return sorted((_joined(group) for group in groups.values()), key=to_line)


def overlay(lower: Record, upper: Record) -> Record:
    """Of one identity. Where both have timed a plan, the upper one's timing stays, unless one of them is wrong."""
    wrong = {plan: each for plan, each in lower.by_plan.items() if each.status == "wrong"}
    found = {**lower.by_plan, **upper.by_plan, **wrong}
    return replace(upper, candidates=_ordered(found.values()))


def staleness(record: Record, software: dict[str, str]) -> tuple[str, ...]:
    """What of tutelx, torch and cuda was of another version, such as "torch 2.11.0, not 2.13.0". Versions are compared
    as versions: 2.10 is later than 2.9, and what a build calls itself ("+cpu") does not count."""
    found = []
    for name in _COMPARED:
        then, now = record.software.get(name), software.get(name)
        if then is not None and now is not None and not _same_version(then, now):
            found.append(f"{name} {then}, not {now}")
    return tuple(found)


def _joined(group: list[Record]) -> Record:
    if len(group) == 1:
        return replace(group[0], candidates=_ordered(group[0].candidates))
    found: dict[object, Candidate] = {}
    for record in group:
        for candidate in record.candidates:
            held = found.get(candidate.plan)
            if held is None or _weight(candidate) > _weight(held):
                found[candidate.plan] = candidate
    # The provenance is that of the latest.
    last = max(group, key=lambda r: (r.provenance.get("date", ""), sorted(r.provenance.items()), _names(r)))
    return replace(last, candidates=_ordered(found.values()))


def _weight(candidate: Candidate) -> tuple[object, ...]:
    """A plan once found wrong stays wrong, then more turns count, then the less lucky timing."""
    wrong = candidate.status == "wrong"
    error = -1.0 if candidate.error is None else candidate.error
    return (wrong, candidate.n, candidate.ratio, candidate.median, candidate.iqr, error, candidate.status)


def _names(record: Record) -> list[tuple[str, str]]:
    return sorted(record.hardware.aliases.items())


def _ordered(candidates: Iterable[Candidate]) -> tuple[Candidate, ...]:
    return tuple(sorted(candidates, key=lambda candidate: candidate.plan.order))


def _same_version(a: str, b: str) -> bool:
    try:
        return Version(Version(a).public) == Version(Version(b).public)
    except InvalidVersion:
        return a == b
