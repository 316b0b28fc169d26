"""The picture of a report: losses, speed, needed capacity, load and plans, over the steps."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, ScalarFormatter

Figures = dict[str, Any]

RECENT = 10  # steps that the load is averaged over: one step is noise
RUN_COLOURS = ("#E69F00", "#0072B2")
# Okabe and Ito's colours: told apart with every kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")
# Others for the plans, so that no plan looks like a layer (Tol).
PLAN_COLOURS = ("#332288", "#DDCC77", "#44AA99", "#CC6677", "#88CCEE", "#117733", "#AA4499", "#999933")


def draw(figures: Figures, path: Path) -> None:
    """Writes a PNG; what has not been measured yet is an empty panel that says so."""
    # Figure without pyplot: no display, no global state.
    picture = Figure(figsize=(12, 10), dpi=110, layout="constrained")
    rows = picture.add_gridspec(3, 2, height_ratios=(1, 1, 0.3 + 0.13 * max(1, len(figures["layers"]))))
    picture.suptitle(_title(figures), fontsize=13)
    _losses(picture.add_subplot(rows[0, 0]), figures)
    _speed(picture.add_subplot(rows[0, 1]), figures)
    _capacity(picture.add_subplot(rows[1, 0]), figures)
    _load(picture.add_subplot(rows[1, 1]), figures)
    _plans(picture, picture.add_subplot(rows[2, :]), figures)
    picture.savefig(path, format="png")


def _title(figures: Figures) -> str:
    flags = figures["flags"]
    title = (
        f"tutelx demo: {flags['layers']} MoE layers, {flags['experts']} experts, top {flags['top_k']},"
        f" {flags['batch'] * flags['seq']} tokens a step, {flags['dtype']}, seed {flags['seed']}"
    )
    return title if figures["complete"] else f"{title}\npartial: {figures['ended']}"


def _losses(axes: Axes, figures: Figures) -> None:
    _frame(axes, "Training loss of the same weights on the same batches", "nats a byte")
    if not _has_steps(axes, figures):
        return
    # The curves coincide: the lower one is wide, the upper one thin, and both stay visible.
    styles = ((5.0, 0.55), (1.3, 1.0))
    for (name, values), colour, (width, alpha) in zip(figures["losses"].items(), RUN_COLOURS, styles):
        held_out = figures["validation_loss"][name]
        suffix = "" if held_out is None else f" (held-out text: {held_out:.4f})"
        axes.plot(values, color=colour, linewidth=width, alpha=alpha, label=name + suffix)
    furthest = max(abs(a - b) for a, b in zip(*figures["losses"].values()))
    axes.plot([], [], " ", label=f"largest difference in a step: {furthest:.1e}")
    axes.legend(frameon=False)


def _speed(axes: Axes, figures: Figures) -> None:
    timing = figures["timing"]
    _frame(axes, "Time of a training step", "milliseconds")
    if not _has_steps(axes, figures):
        return
    # A step that another program disturbed would squeeze all others into a line.
    top = min(
        max(1600 * median(seconds) for seconds in figures["step_seconds"].values()),
        max(1050 * max(seconds) for seconds in figures["step_seconds"].values()),
    )
    above = 0
    for (name, seconds), colour in zip(figures["step_seconds"].items(), RUN_COLOURS):
        values = [1e3 * one for one in seconds]
        middle = median(values)
        shown = [(step, value) for step, value in enumerate(values) if value <= top]
        above += len(values) - len(shown)
        axes.plot(*zip(*shown), ".", color=colour, markersize=4, alpha=0.6)
        label = name
        if timing:
            middle = 1e3 * timing["median_step_seconds"][name]
            label = f"{name}: median {middle:.0f} ms, {timing['steps_per_second'][name]:.2f} steps a second"
        axes.axhline(middle, color=colour, linewidth=1.6, label=label)
    axes.set_ylim(0, top * 1.35)  # room for the legend
    if above:
        axes.plot([], [], " ", label=f"not shown: {above} slower steps")
    if timing:
        axes.set_title(f"Time of a training step: wrapped is {timing['speed_up']:.2f} times as fast", loc="left")
    axes.legend(frameon=False, loc="upper right")


def _capacity(axes: Axes, figures: Figures) -> None:
    _frame(axes, "Needed capacity factor (fullest expert over mean load)", "factor")
    if not _has_steps(axes, figures):
        return
    for i, layer in enumerate(figures["layers"]):
        values = layer["needed_capacity_factor"]
        axes.plot(values, color=COLOURS[i % len(COLOURS)], linewidth=1.3, label=layer["name"])
    axes.axhline(1, color="grey", linewidth=1, linestyle=":", label="perfect balance")
    axes.set_ylim(0, 1.25 * max(max(layer["needed_capacity_factor"]) for layer in figures["layers"]))
    axes.legend(frameon=False, ncols=2, loc="upper left")


def _load(axes: Axes, figures: Figures) -> None:
    _frame(axes, f"Load of each expert, fullest first (mean of the last {RECENT} steps)", "tokens a step")
    axes.set_xlabel("expert, by rank")
    if not _has_steps(axes, figures):
        return
    for i, layer in enumerate(figures["layers"]):
        recent = layer["tokens_per_expert"][-RECENT:]
        loads = sorted((sum(expert) / len(recent) for expert in zip(*recent)), reverse=True)
        idle = loads.count(0)
        label = f"{layer['name']}: {idle} idle" if idle else layer["name"]
        axes.plot(range(1, len(loads) + 1), loads, color=COLOURS[i % len(COLOURS)], linewidth=1.6, label=label)
    mean = sum(loads) / len(loads)
    axes.axhline(mean, color="grey", linewidth=1, linestyle=":", label=f"perfect balance: {mean:.0f}")
    axes.set_yscale("symlog", linthresh=1)  # logarithmic, with a zero for the idle
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.legend(frameon=False)


def _plans(picture: Figure, axes: Axes, figures: Figures) -> None:
    _frame(axes, "Plan of each step, and where it came from", "")
    if not _has_steps(axes, figures):
        return
    layers = figures["layers"]
    names = [[f"{plan} ({source})" for plan, source in zip(layer["plan"], layer["source"])] for layer in layers]
    known = list(dict.fromkeys(name for layer in names for name in layer))
    for i, layer in enumerate(names):
        begin = 0
        for end in range(1, len(layer) + 1):
            if end == len(layer) or layer[end] != layer[begin]:
                colour = PLAN_COLOURS[known.index(layer[begin]) % len(PLAN_COLOURS)]
                axes.barh(i, end - begin, left=begin - 0.5, height=0.8, color=colour)
                begin = end
    axes.set_yticks(range(len(layers)), [layer["name"] for layer in layers])
    axes.invert_yaxis()
    axes.set_xlim(-0.5, len(names[0]) - 0.5)
    patches = [Patch(color=PLAN_COLOURS[i % len(PLAN_COLOURS)], label=name) for i, name in enumerate(known)]
    picture.legend(handles=patches, frameon=False, ncols=4, loc="outside lower center")


def _frame(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title, loc="left")
    axes.set_xlabel("step")
    axes.set_ylabel(unit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)


def _has_steps(axes: Axes, figures: Figures) -> bool:
    if figures["losses"] and all(figures["losses"].values()):
        return True
    axes.text(0.5, 0.5, "no steps yet", transform=axes.transAxes, ha="center", color="grey")
    return False
