"""`tutelx db plot`: the time of every plan over tokens, and where the best one changes."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape

from tutelx.cli._db_show import chosen, in_order, label, opened, problems
from tutelx.errors import InvalidValueError
from tutelx.tuning.key import Key
from tutelx.tuning.records import Record, StoredPlan
from tutelx.tuning.union import union

_MOST_PANELS, _COLUMNS = 24, 3
_MOST_PLANS = 7  # a panel
# Okabe and Ito's colours: told apart with every kind of colour vision.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442")


def plot(args: argparse.Namespace, console: Console) -> int:
    if args.file.is_dir() or not args.file.absolute().parent.is_dir():
        raise InvalidValueError(f"{str(args.file)!r} is a folder or lies in none")
    database = opened(args.db)
    stored = chosen(database.records(), args.hardware)
    if not stored:
        raise InvalidValueError("the database is empty: tutelx tune fills it")
    most = Counter(each.record.hardware.folder for each in stored).most_common(1)[0][0]
    records = [each.record for each in stored if each.record.hardware.folder == (args.hardware or most)]
    panels = _panels(records)
    draw(panels[:_MOST_PANELS], args.file, title=args.hardware or most)
    cut = f", the first {_MOST_PANELS} of {len(panels)} panels" if len(panels) > _MOST_PANELS else ""
    console.print(f"wrote {escape(str(args.file))}{cut}", soft_wrap=True)
    problems(database.problems, console)
    return 0


def _panels(records: Sequence[Record]) -> list[tuple[Key, list[Record]]]:
    """Records that differ in tokens only, those with most keys first; the key stands for all of them."""
    found: dict[Key, dict[Key, Record]] = {}
    for record in union(records):
        held = found.setdefault(replace(record.key, tokens=0), {})
        if record.key not in held or len(held[record.key].candidates) < len(record.candidates):
            held[record.key] = record
    panels = [(key, sorted(of.values(), key=lambda r: r.key.tokens)) for key, of in found.items()]
    return sorted(panels, key=lambda panel: (-len(panel[1]), in_order(panel[0])))


def draw(panels: Sequence[tuple[Key, list[Record]]], path: Path, title: str) -> None:
    """Writes a PNG.

    Raises:
        InvalidValueError: it cannot be written.
    """
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    # Figure without pyplot: no display, no global state.
    picture = Figure(figsize=(6 * columns, 0.6 + 4.4 * rows), dpi=100, layout="constrained")
    picture.suptitle(f"tutelx db plot: {title}", x=0.01, ha="left", fontsize=11)
    grid = picture.subplots(rows, columns, squeeze=False)
    for axes, (key, records) in zip(grid.flat, panels):
        _panel(axes, key, records)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_axis_off()
    try:
        picture.savefig(path, format="png")
    except OSError as error:
        raise InvalidValueError(f"{str(path)!r} cannot be written: {error.strerror}") from None


def _panel(axes: Axes, key: Key, records: list[Record]) -> None:
    axes.set_title(label(key).removeprefix("T0 "), loc="left", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("tokens")
    axes.set_ylabel("ms")
    axes.plot(*_line(records, None), "k--", linewidth=1.2, marker=".", label="default")
    for plan, colour in zip(_plans(records), _COLOURS):
        axes.plot(*_line(records, plan), color=colour, linewidth=1.2, marker=".", label=str(plan))
    for before, after in pairwise(records):
        if before.best.plan != after.best.plan:
            crossing = (before.key.tokens * after.key.tokens) ** 0.5
            axes.axvline(crossing, color="grey", linewidth=0.8, linestyle=":")
    axes.legend(frameon=False, fontsize=7)


def _line(records: Sequence[Record], plan: StoredPlan | None) -> tuple[list[float], list[float]]:
    """Tokens and milliseconds, as the ratio says: what drifted between the turns of plans is not in it."""
    tokens, times = [], []
    for record in records:
        candidate = record.by_plan.get(plan or record.default)
        if candidate is not None and candidate.n and record.key.tokens:
            tokens.append(float(record.key.tokens))
            times.append(1e3 * candidate.ratio * record.by_plan[record.default].median)
    return tokens, times


def _plans(records: Sequence[Record]) -> list[StoredPlan]:
    """Those that are the best somewhere, then those that are nearest to it; wrong ones are left out."""
    best = Counter(record.best.plan for record in records)
    ratios: dict[StoredPlan, list[float]] = {}
    for record in records:
        for candidate in record.candidates:
            if candidate.status == "ok" and candidate.plan != record.default:
                ratios.setdefault(candidate.plan, []).append(candidate.ratio)
    order = sorted(ratios, key=lambda plan: (-best[plan], sum(ratios[plan]) / len(ratios[plan]), plan.order))
    return order[:_MOST_PLANS]
