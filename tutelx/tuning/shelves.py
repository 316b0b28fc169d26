"""The records of a database as a machine sees them: its own, and those of its siblings, nearest first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from tutelx.tuning.hardware import Hardware
from tutelx.tuning.key import Key
from tutelx.tuning.parse import to_line
from tutelx.tuning.records import Record, StoredPlan
from tutelx.tuning.store import Stored
from tutelx.tuning.tiles import of_rules, relative
from tutelx.tuning.union import staleness

SIBLING_CAP = 4.0  # octaves of hardware, beyond which a machine is no sibling


@dataclass(frozen=True, kw_only=True)
class Shelf:
    """One machine's records, one for each key. name: its folder. distance: of the machine, 0 for this one.

    stale: by key, what was measured with other versions. wrong: by key, the plans that are wrong there, if there are.
    """

    name: str
    distance: float
    records: Mapping[Key, Record]
    stale: Mapping[Key, tuple[str, ...]]
    wrong: Mapping[Key, frozenset[StoredPlan]]

    @property
    def fresh(self) -> list[tuple[Key, Record]]:
        return [(key, record) for key, record in self.records.items() if key not in self.stale]

    def wrong_near(self, key: Key, octaves: float) -> set[StoredPlan]:
        """As they were stored, and relative to the rules' tiles."""
        near = [(of_rules(other), plans) for other, plans in self.wrong.items() if key.distance(other) <= octaves]
        return {form for tiles, plans in near for plan in plans for form in (plan, relative(plan, tiles))}


@dataclass(frozen=True, kw_only=True)
class Shelves:
    """Of keys of one kind. own: None if nothing was measured on such a machine."""

    own: Shelf | None
    siblings: tuple[Shelf, ...]


def shelves(stored: Iterable[Stored], hardware: Hardware, software: Mapping[str, str]) -> dict[tuple, Shelves]:
    """By the kind of keys. Of several records for one key on one machine counts that of these versions, then that of
    the layer that counts most, of the machine that is most alike, with most turns, and the latest."""
    groups: dict[tuple, dict[tuple[bool, str], list[tuple[float, Key, Stored]]]] = {}
    for each in stored:
        record = each.record
        links = record.key.world > 1
        own = record.hardware.same_as(hardware, links=links)
        distance = hardware.distance(record.hardware, links=links)
        if not own and distance > SIBLING_CAP:
            continue
        key = record.key if own else _with_threads(record, hardware)
        group = groups.setdefault(key.kind, {}).setdefault((own, "" if own else record.hardware.folder), [])
        group.append((distance, key, each))
    return {kind: _of_kind(found, software) for kind, found in groups.items()}


def _of_kind(
    groups: Mapping[tuple[bool, str], list[tuple[float, Key, Stored]]], software: Mapping[str, str]
) -> Shelves:
    own = [_shelf("here", 0.0, group, software) for (is_own, _), group in groups.items() if is_own]
    siblings = [
        _shelf(name, min(distance for distance, _, _ in group), group, software)
        for (is_own, name), group in groups.items()
        if not is_own
    ]
    siblings.sort(key=lambda shelf: (shelf.distance, shelf.name))
    return Shelves(own=own[0] if own else None, siblings=tuple(siblings))


def _shelf(name: str, distance: float, group: list[tuple[float, Key, Stored]], software: Mapping[str, str]) -> Shelf:
    best: dict[Key, tuple[tuple, Record, tuple[str, ...]]] = {}
    for far, key, stored in group:
        stale = staleness(stored.record, dict(software))
        turns = sum(candidate.n for candidate in stored.record.candidates)
        date = stored.record.provenance.get("date", "")
        order = (-len(stale), stored.rank, -far, turns, date, to_line(stored.record))
        if key not in best or order > best[key][0]:
            best[key] = (order, stored.record, stale)
    return Shelf(
        name=name,
        distance=distance,
        records={key: record for key, (_, record, _) in best.items()},
        stale={key: stale for key, (_, _, stale) in best.items() if stale},
        wrong={key: wrong for key, (_, record, _) in best.items() if (wrong := _wrong(record))},
    )


def _wrong(record: Record) -> frozenset[StoredPlan]:
    return frozenset(c.plan for c in record.candidates if c.status == "wrong" and c.plan != record.default)


def _with_threads(record: Record, hardware: Hardware) -> Key:
    """All cores of a sibling count as all cores of this machine."""
    if record.key.device == "cpu" and record.key.threads == record.hardware.units:
        return replace(record.key, threads=hardware.units)
    return record.key
