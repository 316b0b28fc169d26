"""What the terminal shows of a report: rich tables, built from the same figures as the JSON file."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from tutelx.demo.report import JSON_NAME, PICTURE_NAME

RECENT = 10  # steps that decide whether an expert is idle

Figures = dict[str, Any]


def opening(figures: Figures) -> str:
    flags, text, machine = figures["flags"], figures["text"], figures["machine"]
    return (
        f"{figures['parameters'] / 1e6:.1f} M parameters: {flags['layers']} blocks of {flags['experts']} experts,"
        f" top {flags['top_k']}, dim {flags['dim']}, hidden {flags['hidden']}, {flags['dtype']}\n"
        f"{text['training_bytes'] / 1e3:.0f} kB of {text['source']}, {flags['batch']} x {flags['seq']} bytes a step,"
        f" seed {flags['seed']}\n"
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}"
    )


def parity(figures: Figures) -> Table:
    table = _table("Parity before training: relative error of the wrapped model")
    for name in ("dtype", "logits", "worst gradient", "of", "allowed"):
        table.add_column(name, justify="left" if name in ("dtype", "of") else "right")
    for found in figures["parity"]:
        table.add_row(
            found["dtype"],
            f"{found['logits']:.1e}",
            f"{found['worst_gradient']:.1e}",
            f"{found['worst_gradient_name']} ({found['gradients']} compared)",
            "any" if found["tolerance"] is None else f"{found['tolerance']:.0e}",
            style=None if found["passed"] else "red",
        )
    return table


def results(figures: Figures) -> Iterator[RenderableType]:
    """The tables of what has been measured so far; nothing for what has not."""
    if figures["losses"] and min(len(losses) for losses in figures["losses"].values()):
        yield _losses(figures)
    if figures["timing"]:
        yield _speed(figures["timing"])
    if figures["layers"] and figures["layers"][0]["plan"]:
        yield _layers(figures["layers"])
        yield _plans(figures["layers"])


def last_line(figures: Figures, folder: Path) -> str:
    state = "Report" if figures["complete"] else f"Partial report ({figures['ended']})"
    return f"{state}: {folder}/ ({JSON_NAME}, {PICTURE_NAME})"


def _losses(figures: Figures) -> Table:
    table = _table("Loss (nats a byte)")
    losses = figures["losses"]
    done = min(len(values) for values in losses.values())
    shown = sorted({round(i * (done - 1) / 5) for i in range(6)})
    table.add_column("step")
    for i in shown:
        table.add_column(str(i), justify="right")
    table.add_column("held-out text", justify="right")
    for name, values in losses.items():
        held_out = figures["validation_loss"][name]
        table.add_row(name, *(f"{values[i]:.4f}" for i in shown), "-" if held_out is None else f"{held_out:.4f}")
    furthest = max(abs(a - b) for a, b in zip(*losses.values()))
    table.caption = f"largest difference in a step: {furthest:.1e}"
    if figures["flags"]["dtype"] != "float64":
        # Not an error of either run: top-k is a jump, and training amplifies which side of it a token fell on.
        table.caption += "; rounding may move a token to another expert, --dtype float64 shows them together"
    return table


def _speed(timing: Figures) -> Table:
    table = _table("Training speed (median step, in turns, one process)")
    for name in ("", "ms a step", "steps a second", "steps counted"):
        table.add_column(name, justify="right" if name else "left")
    for name, seconds in timing["median_step_seconds"].items():
        counted = timing["counted_steps"][name]
        table.add_row(name, f"{seconds * 1e3:.1f}", f"{timing['steps_per_second'][name]:.2f}", str(counted))
    low, high = timing["speed_up_quartiles"]
    table.add_row("speed-up", "", f"x {timing['speed_up']:.2f}", f"half of the turns: {low:.2f} to {high:.2f}")
    return table


def _layers(layers: list[Figures]) -> Table:
    table = _table("What the runtime saw")
    for name in ("layer", "needed capacity: first", "median", "highest", "last", "idle experts", "dropped"):
        table.add_column(name, justify="left" if name == "layer" else "right")
    for layer in layers:
        needed = layer["needed_capacity_factor"]
        loads = [sum(expert) for expert in zip(*layer["tokens_per_expert"][-RECENT:])]
        table.add_row(
            layer["name"],
            *(f"{factor:.2f}" for factor in (needed[0], median(needed), max(needed), needed[-1])),
            f"{loads.count(0)} of {len(loads)}",
            str(sum(layer["dropped"])),
        )
    table.caption = f"needed capacity: fullest expert over mean; idle: without a token in the last {RECENT} steps"
    return table


def _plans(layers: list[Figures]) -> Table:
    table = _table("What it did")
    for name in ("plan", "calls", "from", "because (latest)"):
        table.add_column(name, justify="right" if name == "calls" else "left")
    calls: Counter[tuple[str, str, str]] = Counter()
    latest = {}
    for layer in layers:
        for plan, source, reason in zip(layer["plan"], layer["source"], layer["reason"]):
            # Reasons carry figures: those that differ in nothing else are one.
            key = (plan, source, re.sub(r"\d+", "#", reason))
            calls[key] += 1
            latest[key] = reason
    for key, count in calls.most_common():
        table.add_row(key[0], str(count), key[1], latest[key])
    return table


def _table(title: str) -> Table:
    return Table(
        title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, caption_justify="left"
    )
