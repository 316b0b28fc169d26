"""`tutelx db show`, and what the other verbs share: which database, and what a key and its problems look like."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tutelx.bench.tables import seconds
from tutelx.errors import InvalidValueError
from tutelx.tuning.files import Problem
from tutelx.tuning.key import Key
from tutelx.tuning.store import Database, Stored

_MOST_PROBLEMS = 20


def show(args: argparse.Namespace, console: Console) -> int:
    database = opened(args.db)
    shown = chosen(database.records(), args.hardware)
    for folder in sorted({stored.record.hardware.folder for stored in shown}):
        of_folder = [stored for stored in shown if stored.record.hardware.folder == folder]
        _machine(folder, of_folder, console)
        console.print(_table(of_folder))
        console.print()
    keys = len({stored.record.key for stored in shown})
    console.print(f"{len(shown)} records of {keys} keys")
    if not shown:
        for layer in database.layers:
            if layer.root is not None:
                console.print(f"  {layer.name}: {escape(str(layer.root))}", soft_wrap=True)
    problems(database.problems, console)
    return 0


def opened(folders: Sequence[Path] | None) -> Database:
    """The folders in this order, else the standard layers.

    Raises:
        InvalidValueError: a folder that does not exist, or is named twice.
    """
    if not folders:
        return Database.open()
    for folder in folders:
        if not folder.is_dir():
            raise InvalidValueError(f"{str(folder)!r} is no folder")
    return Database.of_folders(*folders)


def chosen(stored: Iterable[Stored], hardware: str | None) -> list[Stored]:
    """Those of one machine; None: all.

    Raises:
        InvalidValueError: no record is of that machine.
    """
    every = list(stored)
    found = [each for each in every if hardware in (None, each.record.hardware.folder)]
    if hardware is not None and not found:
        known = ", ".join(sorted({each.record.hardware.folder for each in every})) or "no machine at all"
        raise InvalidValueError(f"hardware={hardware!r} is not in the database, which has {known}")
    return found


def label(key: Key) -> str:
    """Of one line, such as "T512 K2 load 2 E64 M128 H256 float32 training"."""
    parts = [f"T{key.tokens} K{key.top_k}"]
    if key.load_factor:
        parts.append(f"load {key.load_factor:.3g}")
    parts.append(f"E{key.num_experts} M{key.model_dim} H{key.hidden_dim} {key.dtype}")
    parts.append("training" if key.training else "inference")
    if key.world > 1:
        parts.append(f"{key.world} ranks" + (f", {key.ranks_per_node} a node" if key.ranks_per_node else ""))
    return " ".join(parts)


def in_order(key: Key) -> tuple:
    sizes = (key.num_experts, key.model_dim, key.hidden_dim, key.expert_numbers)
    return (key.dtype, not key.training, key.world, key.threads, *sizes, key.top_k, key.load_factor, key.tokens)


def problems(found: Sequence[Problem], console: Console) -> None:
    for problem in found[:_MOST_PROBLEMS]:
        console.print(f"[bold red]skipped[/] {escape(str(problem))}", soft_wrap=True)
    if len(found) > _MOST_PROBLEMS:
        console.print(f"and {len(found) - _MOST_PROBLEMS} more")


def _machine(folder: str, stored: Sequence[Stored], console: Console) -> None:
    hardware = stored[0].record.hardware
    names = ", ".join(sorted({name for each in stored for name in each.record.hardware.aliases.values()}))
    rates = f"memory {hardware.memory_rate:.4g} GB/s"
    for kind, link, rate in (
        ("inside nodes", hardware.intra_link, hardware.intra_rate),
        ("between nodes", hardware.inter_link, hardware.inter_rate),
    ):
        rates += f", {kind} {link} {rate:.3g} GB/s" if link else ""
    console.print(f"[bold]{folder}[/]  {escape(names)}  {rates}", soft_wrap=True)


def _table(stored: Sequence[Stored]) -> Table:
    out, left = Table(box=None, pad_edge=False), ("workload", "best plan", "versions", "layer")
    for name in ("workload", "threads", "default", "best plan", "best", "gain", "plans", "turns", "versions", "layer"):
        out.add_column(name, justify="left" if name in left else "right", no_wrap=name == "workload")
    for each in sorted(stored, key=lambda each: in_order(each.record.key)):
        record = each.record
        default, best = record.by_plan[record.default], record.best
        same = best.plan == record.default
        known = [name for name in ("tutelx", "torch") if name in record.software]
        versions = " ".join(f"{name} {record.software[name]}" for name in known)
        out.add_row(
            label(record.key),
            str(record.key.threads),
            seconds(default.median),
            "default" if same else str(best.plan),
            seconds(best.median),
            "" if same else f"{1 / best.ratio - 1:+.0%}",
            str(len(record.candidates)),
            str(default.n),
            escape(versions),
            escape(each.layer),
        )
    return out
