"""The picture of a run: how close each row comes to its yardstick, and how it fares against what else there is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tutelx.bench.record import Run
from tutelx.bench.tables import fastest_plain, shape
from tutelx.errors import InvalidValueError

# Okabe and Ito's colours: told apart with every kind of colour vision.
COPY, GEMMS = "#0072B2", "#E69F00"
KINDS = {"plain": ("#0072B2", "o"), "peer": ("#D55E00", "D"), "reference": ("#009E73", "s")}
TARGET = 80  # percent of the copy that the project asks of itself

Record = dict[str, Any]


def draw(run: Run, path: Path) -> None:
    """Writes a PNG, one line a row."""
    rows = [row for row in run["rows"] if row["status"] == "ok"]
    # Figure without pyplot: no display, no global state.
    picture = Figure(figsize=(15, max(3.5, 1.8 + 0.3 * len(rows))), dpi=110, layout="constrained")
    picture.suptitle(_title(run), x=0.01, ha="left", fontsize=11)
    left, right = picture.subplots(1, 2, sharey=True)
    if rows:
        _percent(left, rows)
        _speed_up(right, rows)
        left.set_yticks(range(len(rows)), [f"{row['op']}  {shape(row)}  {row['dtype']}" for row in rows], fontsize=8)
        left.set_ylim(len(rows) - 0.4, -0.6)
        _separate(rows, left, right)
    else:
        left.text(0.5, 0.5, "nothing was measured", transform=left.transAxes, ha="center", color="grey")
    try:
        picture.savefig(path, format="png")
    except OSError as error:
        raise InvalidValueError(f"{str(path)!r} cannot be written: {error.strerror}") from None


def _title(run: Run) -> str:
    about = run["machine"]
    state = "" if run["complete"] else "  (interrupted)"
    return f"tutelx bench: {about['device_name']}, {about['threads']} threads, torch {about['torch']}{state}"


def _percent(axes: Axes, rows: list[Record]) -> None:
    _frame(axes, "Percent of the yardstick, median and quartiles", "percent")
    largest = 100.0
    for name, colour, ink in (("copy", COPY, "white"), ("GEMMs", GEMMS, "black")):
        at = [i for i, row in enumerate(rows) if row["yardstick"] == name]
        if not at:
            continue
        found = [rows[i]["percent_of_yardstick"] for i in at]
        medians = [each["median"] for each in found]
        # The quartiles of pairs lie around their median, and rounding must not make a bar of negative length.
        below = [max(0.0, each["median"] - each["q1"]) for each in found]
        above = [max(0.0, each["q3"] - each["median"]) for each in found]
        label = "of a copy of the bytes that must move" if name == "copy" else "of the bare matrix products"
        axes.barh(at, medians, color=colour, height=0.62, label=label)
        axes.errorbar(medians, at, xerr=[below, above], fmt="none", ecolor="#333333", elinewidth=1, capsize=2)
        for i, value in zip(at, medians):
            axes.text(largest * 0.008, i, f"{value:.0f}", va="center", fontsize=7.5, color=ink, fontweight="bold")
        largest = max(largest, *medians)
    axes.axvline(TARGET, color="grey", linewidth=1, linestyle="--", label=f"target, {TARGET} %")
    axes.set_xlim(0, min(largest * 1.08, 250))
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.06 - 0.5 / len(rows)), ncols=3, fontsize=8)


def _speed_up(axes: Axes, rows: list[Record]) -> None:
    _frame(axes, "Speed-up of tutelx (right of the line: tutelx is faster)", "times, logarithmic")
    labelled = set()
    for i, row in enumerate(rows):
        for contender in row["contenders"]:
            kind, name = contender["kind"], contender["name"]
            if kind not in KINDS:
                continue
            colour, marker = KINDS[kind]
            ratio = row["speed_up"][name]
            axes.plot(ratio, i, marker, color=colour, markersize=5, label=None if kind in labelled else kind)
            # Peers are named; of several ways in plain torch the fastest is what counts.
            if kind == "peer" or (kind == "plain" and name == fastest_plain(row)):
                axes.annotate(name, (ratio, i), xytext=(0, 4), textcoords="offset points", ha="center", fontsize=6.5)
            labelled.add(kind)
    axes.axvline(1, color="grey", linewidth=1, linestyle="--")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.5), max(high, 2) * 2)  # room for the names
    axes.tick_params(axis="y", labelleft=False)
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.06 - 0.5 / len(rows)), ncols=3, fontsize=8)


def _separate(rows: list[Record], *both: Axes) -> None:
    for i in range(1, len(rows)):
        if rows[i]["op"] != rows[i - 1]["op"]:
            for axes in both:
                axes.axhline(i - 0.5, color="#DDDDDD", linewidth=0.8, zorder=0)


def _frame(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel(unit)
    axes.spines[["top", "right"]].set_visible(False)
