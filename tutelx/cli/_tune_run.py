"""What `tutelx tune` does once torch is loaded: find the layers, measure, keep, show."""

from __future__ import annotations

import argparse
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tutelx.cli import FAILURE, INTERRUPTED
from tutelx.cli._interrupts import held_interrupts
from tutelx.env import is_ci, local_rank
from tutelx.errors import InvalidValueError
from tutelx.tuner import report
from tutelx.tuner.grid import Grid
from tutelx.tuner.keep import DatabaseStore
from tutelx.tuner.machine import Machine
from tutelx.tuner.measure import Options
from tutelx.tuner.provenance import command_line
from tutelx.tuner.search import Found, Search, search, world_here
from tutelx.tuner.shapes import Shape, shapes_of
from tutelx.tuning.records import Record
from tutelx.types import Workload

_AGAIN = 1.0  # seconds after an interrupt from which a second one ends the process at once


def run(args: argparse.Namespace, shapes: list[Shape] | None, grid: Grid, console: Console, *, ranks: int) -> int:
    """Exit codes: 1 if something could not be measured, 130 if interrupted; what was measured is kept."""
    device = _device(args.device)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if shapes is None:
        shapes = _of_model(args.from_model, args.dtype, console)
    if ranks > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        group = dist.group.WORLD if ranks > 1 else None
        store = DatabaseStore(args.db)
        machine = store.settled(Machine.here(device, group))
        with _held_back() as stop:
            what = Search(
                workloads=grid.workloads(shapes, world_here(device, group)),
                options=Options(
                    seconds=args.seconds, seed=args.seed, command=command_line(args.argv), stop=lambda: bool(stop)
                ),
                exhaustive=args.exhaustive,
                margin=args.margin,
                budget=args.budget,
                cost_model=store.cost_model(machine),
            )
            found = _search(what, store, machine, group, console)
        return _finish(found, store, args, console)
    finally:
        if ranks > 1:
            dist.destroy_process_group()


def _search(
    what: Search, store: DatabaseStore, machine: Machine, group: dist.ProcessGroup | None, console: Console
) -> Found:
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(
        TextColumn("{task.description}"), *columns, console=console, auto_refresh=not is_ci(), speed_estimate_period=600
    ) as progress:
        task = progress.add_task("", total=len(what.workloads))

        def before(workload: Workload) -> None:
            progress.update(task, description=report.label(workload))

        def after(record: Record | None, measured: bool) -> None:
            progress.advance(task)

        return search(what, store, machine, group=group, before=before, after=after)


def _finish(found: Found, store: DatabaseStore, args: argparse.Namespace, console: Console) -> int:
    if not console.quiet:
        with held_interrupts():
            for path, write in ((args.json, report.write_json), (args.plot, report.draw)):
                if path is not None:
                    write(found, path, command_line(args.argv))
        if found.records:
            console.print(report.table(found.records))
        console.print(report.summary(found, store.where))
        for key, why in found.failed.items():
            console.print(f"[bold red]FAILED[/] {report.label(key)}: {why}")
    if found.interrupted:
        return INTERRUPTED
    return FAILURE if found.failed else 0


def _device(name: str | None) -> torch.device:
    if name == "cuda" or (name is None and torch.cuda.is_available()):
        if not torch.cuda.is_available():
            raise InvalidValueError("--device cuda was given, but torch finds no CUDA device")
        device = torch.device("cuda", local_rank())
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")


def _of_model(path: str, dtypes: list[str] | None, console: Console) -> list[Shape]:
    from tutelx.checkpoints import formats
    from tutelx.checkpoints.state import leaves
    from tutelx.cli import _doctor_model
    from tutelx.tuner.models import shapes_of_state

    with console.status(f"looking at {path}"):
        where = Path(path)
        if where.suffix == ".json" or (where / "config.json").is_file():
            found = shapes_of(_doctor_model.build(path))
        else:
            tensors = {name: value for name, value in leaves(formats.read(where)) if isinstance(value, torch.Tensor)}
            found = shapes_of_state(tensors, repr(path))
    chosen: dict[Shape, None] = {}
    for shape in found:
        for dtype in dtypes or [shape.dtype]:
            chosen[shape.in_dtype(dtype)] = None
    return list(chosen)


@contextmanager
def _held_back() -> Iterator[list[float]]:
    """Ctrl-C only leaves its time in the list, so that all ranks can stop at one point; a second one, a second later,
    raises KeyboardInterrupt at once."""
    came: list[float] = []
    if threading.current_thread() is not threading.main_thread():
        yield came
        return

    def note(number: int, frame: FrameType | None) -> None:
        came.append(time.monotonic())
        if came[-1] - came[0] > _AGAIN:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, note)
    try:
        yield came
    finally:
        signal.signal(signal.SIGINT, before)
