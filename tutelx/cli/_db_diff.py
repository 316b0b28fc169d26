"""`tutelx db diff`: what two databases say of the same keys."""

from __future__ import annotations

import argparse
import math

from rich.console import Console
from rich.table import Table

from tutelx.bench.tables import seconds
from tutelx.cli._db_show import in_order, label, opened, problems
from tutelx.errors import InvalidValueError
from tutelx.tuning.records import Record
from tutelx.tuning.store import Database


def diff(args: argparse.Namespace, console: Console) -> int:
    if not (args.tolerance >= 1 and math.isfinite(args.tolerance)):
        raise InvalidValueError(f"tolerance={args.tolerance} must be at least 1")
    a, b = opened([args.a]), opened([args.b])
    ours, theirs = _by_key(a), _by_key(b)
    both = sorted(ours.keys() & theirs.keys(), key=lambda at: (at[0], in_order(at[1])))
    table = Table(box=None, pad_edge=False)
    for name in ("machine", "workload", "default A", "default B", "best A", "best B"):
        table.add_column(name, justify="right" if "default" in name else "left")
    differing = 0
    for at in both:
        one, other = ours[at], theirs[at]
        times = [each.by_plan[each.default].median for each in (one, other)]
        drifted = max(times) > args.tolerance * min(times)
        if not drifted and one.best.plan == other.best.plan:
            continue
        differing += 1
        best = [f"{each.best.plan} ({each.best.ratio:.2f})" for each in (one, other)]
        table.add_row(at[0], label(at[1]), *map(seconds, times), *best)
    if differing:
        console.print(table)
    what = f"in the best plan, or in the default's time by more than {args.tolerance:g}"
    console.print(f"{len(both)} keys in both, of which {differing} differ {what}", soft_wrap=True)
    for name, mine, others in (("A", ours, theirs), ("B", theirs, ours)):
        only = sorted(mine.keys() - others.keys(), key=lambda at: (at[0], in_order(at[1])))
        console.print(f"{len(only)} keys only in {name}")
        for folder, key in only:
            console.print(f"  {folder}  {label(key)}", soft_wrap=True)
    problems([*a.problems, *b.problems], console)
    return 0


def _by_key(database: Database) -> dict[tuple, Record]:
    """Of several records of a machine and a key, the one with most turns."""
    found: dict[tuple, Record] = {}
    for stored in database.records():
        at = (stored.record.hardware.folder, stored.record.key)
        if at not in found or _turns(stored.record) > _turns(found[at]):
            found[at] = stored.record
    return found


def _turns(record: Record) -> int:
    return sum(candidate.n for candidate in record.candidates)
