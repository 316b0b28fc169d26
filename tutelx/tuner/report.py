"""What tuning found, for people: a table, a file, a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from tutelx.bench.tables import seconds
from tutelx.errors import InvalidValueError
from tutelx.tuner.search import Found
from tutelx.tuner.shapes import Shape
from tutelx.tuning.key import Key
from tutelx.tuning.records import Candidate, Record
from tutelx.types import Workload

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_LINES = 200  # of the picture
_SAME, _FASTER = "#999999", "#0072B2"  # Okabe and Ito's blue: told apart with every kind of colour vision


def label(what: Key | Workload) -> str:
    """Of one line, such as "T512 K2 load 2 M128 H256 E64 gated float32 training, 2 ranks"."""
    key = Key.of(what) if isinstance(what, Workload) else what
    load = f" load {key.load_factor:.3g}" if key.load_factor else ""
    ranks = f", {key.world} ranks" if key.world > 1 else ""
    return f"T{key.tokens} K{key.top_k}{load} {Shape.of(key)} {'training' if key.training else 'inference'}{ranks}"


def table(records: Sequence[Record]) -> Table:
    """Key, default, best, gain, spread. Gain: how much longer the default takes than the best."""
    out = Table(box=None, pad_edge=False)
    out.add_column("workload")
    for name in ("default", "best plan", "best", "gain", "spread", "plans", "turns"):
        out.add_column(name, justify="left" if name == "best plan" else "right")
    for record in records:
        default, best = record.by_plan[record.default], record.best
        same = best.plan == record.default
        out.add_row(
            label(record.key),
            seconds(default.median),
            "default" if same else str(best.plan),
            seconds(best.median),
            "" if same else f"{gain(best):+.0%}",
            f"{best.spread:.1%}" if not same else "",
            str(len(record.candidates)),
            str(default.n),
        )
    return out


def summary(found: Found, where: str) -> str:
    better = [record.best for record in found.records if record.best.plan != record.default]
    parts = [f"{found.measured} workloads measured, {len(found.records) - found.measured} known before, in {where}"]
    if found.records:
        most = f", at most {max(map(gain, better)):+.0%}" if better else ""
        parts.append(f"{len(better)} of {len(found.records)} run faster than by the rules{most}")
    if found.left:
        why = "interrupted" if found.interrupted else "out of time"
        parts.append(f"{why}, {found.left} left: run it again to go on")
    return "; ".join(parts)


def gain(best: Candidate) -> float:
    return 1 / best.ratio - 1


def write_json(found: Found, path: Path, command: str) -> None:
    """Raises InvalidValueError if the file cannot be written."""
    whole = {
        "schema": 1,
        "kind": "tutelx tune",
        "command": command,
        "complete": found.complete,
        "failed": {label(key): why for key, why in found.failed.items()},
        "records": [{**asdict(record), "best": asdict(record.best.plan)} for record in found.records],
    }
    try:
        path.write_text(json.dumps(whole, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise InvalidValueError(f"{str(path)!r} cannot be written: {error.strerror}") from None


def draw(found: Found, path: Path, command: str) -> None:
    """Writes a PNG: what each workload gains over the rules' plan, one line each.

    Raises:
        InvalidValueError: it cannot be written.
    """
    from matplotlib.figure import Figure

    records = sorted(found.records, key=lambda record: record.best.ratio)[:_MOST_LINES]
    # Figure without pyplot: no display, no global state.
    picture = Figure(figsize=(13, max(3.0, 1.6 + 0.24 * len(records))), dpi=110, layout="constrained")
    cut = "" if len(records) == len(found.records) else f", the best {len(records)} of {len(found.records)} workloads"
    state = "" if found.complete else " (incomplete)"
    picture.suptitle(f"{command[:110]}{cut}{state}", x=0.01, ha="left", fontsize=10)
    axes = picture.subplots()
    _bars(axes, records)
    try:
        picture.savefig(path, format="png")
    except OSError as error:
        raise InvalidValueError(f"{str(path)!r} cannot be written: {error.strerror}") from None


def _bars(axes: Axes, records: Sequence[Record]) -> None:
    axes.set_title(
        "Time of the best plan over that of the rules' plan (bars: two standard errors)", loc="left", fontsize=9
    )
    axes.spines[["top", "right"]].set_visible(False)
    if not records:
        axes.text(0.5, 0.5, "nothing was measured", transform=axes.transAxes, ha="center", color="grey")
        return
    places, ratios = range(len(records)), [record.best.ratio for record in records]
    colours = [_SAME if record.best.plan == record.default else _FASTER for record in records]
    axes.barh(places, ratios, color=colours, height=0.62)
    axes.errorbar(ratios, places, xerr=[r.best.spread for r in records], fmt="none", ecolor="#333333", elinewidth=1)
    for i, record in enumerate(records):
        name = "default" if record.best.plan == record.default else str(record.best.plan)
        axes.text(0.01, i, name, va="center", fontsize=7, color="white")
    axes.axvline(1, color="grey", linewidth=1, linestyle="--")
    axes.set_yticks(places, [label(record.key) for record in records], fontsize=7)
    axes.set_ylim(len(records) - 0.4, -0.6)
