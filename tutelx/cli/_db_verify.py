"""`tutelx db verify`: some keys of this machine, timed again."""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable

from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from tutelx.bench.tables import seconds
from tutelx.cli import FAILURE
from tutelx.cli._db_show import in_order, label, opened, problems
from tutelx.errors import InvalidValueError
from tutelx.planner import RulePlanner
from tutelx.tuner.grid import workload_of
from tutelx.tuner.measure import measure_key
from tutelx.tuning.here import here, software
from tutelx.tuning.records import Record
from tutelx.tuning.shelves import shelves
from tutelx.tuning.store import Database

Measure = Callable[..., Record]


def verify(args: argparse.Namespace, console: Console, measure: Measure = measure_key) -> int:
    if args.keys < 1:
        raise InvalidValueError(f"keys={args.keys} must be at least 1")
    if not (args.tolerance >= 1 and math.isfinite(args.tolerance)):
        raise InvalidValueError(f"tolerance={args.tolerance} must be at least 1")
    database = opened(args.db)
    records = _sample(database, args.keys, args.seed)
    table = Table(box=None, pad_edge=False)
    for name in ("workload", "best plan", "default then", "now", "best / default then", "now", "drift", ""):
        table.add_column(name, justify="left" if name in ("workload", "best plan", "") else "right")
    drifted = 0
    for record in track(records, "measuring", console=console, transient=True):
        before = record.best
        try:
            workload = workload_of(record.key)
            plan = before.plan.plan(RulePlanner().plan(workload).plan)
            again = measure(record.key, [plan], seconds=args.seconds)
        except InvalidValueError as error:
            table.add_row(label(record.key), str(before.plan), "", "", "", "", "", escape(f"not measured: {error}"))
            continue
        now = again.by_plan.get(before.plan) or again.by_plan[again.default]
        drift = math.inf if now.status == "wrong" else now.ratio / before.ratio
        failed = drift > args.tolerance
        drifted += failed
        table.add_row(
            label(record.key),
            "default" if before.plan == record.default else str(before.plan),
            seconds(record.by_plan[record.default].median),
            seconds(again.by_plan[again.default].median),
            f"{before.ratio:.3f}",
            "wrong" if now.status == "wrong" else f"{now.ratio:.3f}",
            f"{drift:.2f}",
            "[bold red]drifted[/]" if failed else "",
        )
    if records:
        console.print(table)
    console.print(f"{len(records)} keys of this machine looked at, {drifted} drifted by more than {args.tolerance:g}")
    problems(database.problems, console)
    return FAILURE if drifted else 0


def _sample(database: Database, count: int, seed: int) -> list[Record]:
    """Of what answers here, on one rank: keys whose best plan is not the default first, as these can be lost."""
    found: list[Record] = []
    devices = sorted({stored.record.hardware.device for stored in database.records()})
    for device in devices:
        if device != "cpu" and not _has_card():
            continue
        for each in shelves(database.records(), here(device), software()).values():
            if each.own is not None:
                found += [record for key, record in each.own.records.items() if key.world == 1]
    found.sort(key=lambda record: in_order(record.key))
    random.Random(seed).shuffle(found)
    found.sort(key=lambda record: record.best.plan == record.default)
    return sorted(found[:count], key=lambda record: in_order(record.key))


def _has_card() -> bool:
    import torch

    return torch.cuda.is_available()
