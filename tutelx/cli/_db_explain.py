"""`tutelx db explain`: every tier that was asked, and why one of them answers."""

from __future__ import annotations

import argparse

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tutelx.bench.tables import seconds
from tutelx.cli._db_show import chosen, label, opened, problems
from tutelx.cli._db_workload import parse_workload
from tutelx.planner import RulePlanner
from tutelx.scheduler.models import fitted
from tutelx.tuning.answer import TIERS, Answer
from tutelx.tuning.hardware import Hardware
from tutelx.tuning.here import here, software
from tutelx.tuning.key import Key
from tutelx.tuning.lookup import Lookup
from tutelx.tuning.store import Database
from tutelx.types import Workload

_MOST_ROWS = 30


def explain(args: argparse.Namespace, console: Console) -> int:
    workload = parse_workload(args.workload, threads=torch.get_num_threads())
    database = opened(args.db)
    hardware = _hardware(database, workload, args.hardware)
    own = [
        stored.record
        for stored in database.records()
        if stored.record.hardware.same_as(hardware, links=stored.record.key.world > 1)
    ]
    lookup = Lookup(database, hardware, fitted(hardware, own), software=software())
    key, rule = Key.of(workload), RulePlanner().plan(workload)
    answer = lookup.find(key, workload, rule)

    console.print(f"key       {label(key)}, {key.threads} threads", soft_wrap=True)
    console.print(f"machine   {hardware.folder}", soft_wrap=True)
    console.print(f"default   {rule.plan}: {escape(rule.reason)}", soft_wrap=True)
    for tier in TIERS:
        found = lookup.ask(tier, key, workload, rule)
        mark = "->" if tier == answer.tier else "  "
        plan = f"{found.plan}: " if isinstance(found, Answer) else ""
        reason = answer.reason if tier == answer.tier else found.reason
        console.print(f"{mark} {tier:<8}{plan}{escape(reason)}", soft_wrap=True)
    if answer.considered:
        console.print(_table(answer))
    expected = "unknown" if answer.predicted is None else seconds(answer.predicted)
    console.print(f"answer    {answer.plan}, from tier {answer.tier}; time of a call: {expected}", soft_wrap=True)
    problems(database.problems, console)
    return 0


def _hardware(database: Database, workload: Workload, name: str | None) -> Hardware:
    """The machine that asks. Over ranks its links are those that were measured on such a machine."""
    if name is not None:
        return chosen(database.records(), name)[0].record.hardware
    device = workload.device
    own = here(device)
    if workload.world > 1:
        for stored in database.records():
            if stored.record.key.world > 1 and stored.record.hardware.same_as(own, links=False):
                return stored.record.hardware
    return own


def _table(answer: Answer) -> Table:
    out = Table(box=None, pad_edge=False)
    for name in ("plan", "of the default's time", "time", ""):
        out.add_column(name, justify="right" if "time" in name else "left")
    for each in answer.considered[:_MOST_ROWS]:
        time = "" if each.predicted is None else seconds(each.predicted)
        out.add_row(str(each.plan), f"{each.ratio:.3f}", time, escape(each.verdict) or "[bold]chosen[/]")
    return out
