"""What `tutelx bench` does once torch is loaded: measure, show, write, compare."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tutelx.bench import compare, machine, record, tables
from tutelx.bench.rows import Row
from tutelx.bench.settings import Settings
from tutelx.bench.suite import Suite
from tutelx.cli import FAILURE, INTERRUPTED
from tutelx.cli._interrupts import held_interrupts
from tutelx.env import is_ci
from tutelx.errors import InvalidValueError


@dataclass(frozen=True, kw_only=True)
class Files:
    """Where to write, and what to compare with. Checked before anything is measured."""

    json: Path | None
    plot: Path | None
    against: Path | None
    tolerance: float

    def __post_init__(self) -> None:
        compare.check_tolerance(self.tolerance)
        for path in (self.json, self.plot):
            if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
                raise InvalidValueError(f"{str(path)!r} is a folder or lies in none")


def run(settings: Settings, files: Files, console: Console) -> int:
    """Exit codes: 1 if ours was wrong or slower than allowed, 130 if interrupted; what was measured is kept."""
    before = None if files.against is None else record.read(files.against)
    suite = Suite.of(settings)
    complete = False
    try:
        _measure(suite, console)
        complete = True
    except KeyboardInterrupt:
        console.print("interrupted: the rows so far are kept")
    with held_interrupts():
        found = record.run_as_json(
            suite.rows,
            machine=machine.describe(suite.device, threads=settings.threads),
            command=["tutelx", *map(shlex.quote, sys.argv[1:])],
            missing=suite.missing,
            complete=complete,
        )
        if files.json is not None:
            record.write(found, files.json)
        if files.plot is not None:
            from tutelx.bench import figure

            figure.draw(found, files.plot)
    console.print(tables.machine(found))
    for part in tables.results(found):
        console.print(part)
    if not complete:
        return INTERRUPTED
    failed = any(row.status == "failed" for row in suite.rows)
    if before is not None:
        comparison = compare.compare(found, before, tolerance=files.tolerance)
        for part in tables.comparison(comparison):
            console.print(part)
        failed = failed or not comparison.passed
    return FAILURE if failed else 0


def _measure(suite: Suite, console: Console) -> None:
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), *columns, console=console, auto_refresh=not is_ci()) as progress:
        task = progress.add_task("peers", total=len(suite.plan()))

        def after(row: Row) -> None:
            if row.status == "failed":
                progress.console.print(f"[bold red]FAILED[/] {row.op} {row.shape} {row.dtype}")
            progress.advance(task)

        suite.run(lambda name: progress.update(task, description=name), after)
