"""What the terminal shows of a run and of a comparison."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from tutelx.bench.compare import Comparison
from tutelx.bench.record import Run

Record = dict[str, Any]


def machine(run: Run) -> str:
    about = run["machine"]
    caches = ", ".join(f"{name} {_bytes(size)}" for name, size in about["caches"].items()) or "caches unknown"
    vectors = f" ({about['vectors']})" if about["device"] == "cpu" and "vectors" in about else ""
    return (
        f"{about['device_name']}{vectors}, {about['threads']} of {about['cores']} cores, {caches},"
        f" torch {about['torch']}, tutelx {about['tutelx']}"
    )


def results(run: Run) -> Iterator[RenderableType]:
    """One table a group of ops, then what did not work and what was left out."""
    rows = run["rows"]
    for op, group in groupby((row for row in rows if row["status"] == "ok"), key=lambda row: row["op"]):
        yield _op(op, list(group))
    for status, style in (("left out", "yellow"), ("failed", "bold red")):
        for row in rows:
            if row["status"] == status:
                yield f"[{style}]{status.upper()}[/] {row['op']} {shape(row)} {row['dtype']}: {escape(row['error'])}"
    yield from _footnotes(run)


def _op(op: str, rows: Sequence[Record]) -> Table:
    table = _table(op)
    table.add_column("shape", overflow="fold")
    for name in ("dtype", "median", "IQR", "must move", "rate", f"% of {rows[0]['yardstick']}", "quartiles"):
        table.add_column(name, justify="left" if name == "dtype" else "right", no_wrap=True)
    table.add_column("x plain torch", overflow="fold")
    others = [each["name"] for row in rows for each in row["contenders"] if each["kind"] in ("reference", "peer")]
    for name in dict.fromkeys(others):
        table.add_column(f"x {name}", justify="right")
    for row in rows:
        ours, percent = row["contenders"][0], row["percent_of_yardstick"]
        mark = "*" if row["working_set"]["limited_by"] else ""
        gemms = row["gflop_per_s"] is not None
        table.add_row(
            shape(row),
            row["dtype"],
            seconds(ours["median_s"]),
            seconds(ours["iqr_s"]),
            _bytes(row["must_move_bytes"]),
            f"{row['gflop_per_s']:.3g} GFLOP/s" if gemms else f"{row['gb_per_s']:.3g} GB/s",
            f"{percent['median']:.0f}{mark}",
            f"{percent['q1']:.0f}..{percent['q3']:.0f}",
            _fastest_plain(row),
            *(_ratio(row["speed_up"].get(name)) for name in dict.fromkeys(others)),
        )
    return table


def fastest_plain(row: Record) -> str | None:
    """Of several ways in plain torch the fastest is the one to beat."""
    plain = [each for each in row["contenders"] if each["kind"] == "plain"]
    return min(plain, key=lambda each: each["median_s"])["name"] if plain else None


def _fastest_plain(row: Record) -> str:
    name = fastest_plain(row)
    return "" if name is None else f"{_ratio(row['speed_up'][name])} {name}"


def _footnotes(run: Run) -> Iterator[str]:
    limited = [row for row in run["rows"] if row["status"] == "ok" and row["working_set"]["limited_by"]]
    if limited:
        names = sorted({row["working_set"]["limited_by"] for row in limited})
        yield f"* {len(limited)} rows are partly in the cache: their working set was limited by {' and '.join(names)}"
    for peer, reason in run["missing_peers"].items():
        yield f"[dim]peer {peer}: {escape(reason)}[/]"
    reasons: dict[str, list[str]] = {}
    for row in run["rows"]:
        for name, reason in row["skipped"].items():
            reasons.setdefault(f"{row['op']}: {name}: {reason}", []).append(shape(row))
    for reason in reasons:
        yield f"[dim]{escape(reason)}[/]"


def comparison(found: Comparison) -> Iterator[RenderableType]:
    yield from (f"[yellow]note[/] {escape(note)}" for note in found.notes)
    if found.slower:
        table = _table(f"Slower than before by more than x {found.tolerance:g}, relative to the yardstick of each run")
        table.add_column("op")
        table.add_column("shape")
        table.add_column("dtype")
        for name in ("% before", "% now", "times slower"):
            table.add_column(name, justify="right")
        for change in found.slower:
            table.add_row(
                change.op,
                change.shape,
                change.dtype,
                f"{change.before:.0f}",
                f"{change.now:.0f}",
                f"{change.ratio:.2f}",
                style="red",
            )
        yield table
    yield from (f"[bold red]LOST[/] {escape(row)}" for row in found.lost)
    if found.unmatched:
        yield f"{len(found.unmatched)} rows have nothing to compare with"
    verdict = "no row is slower" if found.passed else f"{len(found.slower)} slower, {len(found.lost)} lost"
    yield f"{len(found.changes)} rows compared, tolerance x {found.tolerance:g}: {verdict}"


def shape(row: Record) -> str:
    """Without what the op does not depend on."""
    depends = {"linear": "TDE", "gate": "TKE", "gate_backward": "TKE", "route": "TKE"}
    depends |= {"activation": "TKH", "activation_backward": "TKH", "expert_ffn": "TDKEH", "layer": "TDKEH"}
    depends |= {"layer_inference": "TDKEH", "expert_linear": "TDKEH"}
    names = depends.get(row["op"], "TDKE") + ("S" if row["shape"].get("S", 1) > 1 else "")
    return " ".join(f"{name}{size}" for name, size in row["shape"].items() if name in names)


def seconds(value: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if value * scale >= 1:
            return f"{value * scale:.3g} {unit}"
    return f"{value * 1e6:.2f} us"


def escape(text: str) -> str:
    """rich reads square brackets as markup."""
    return text.replace("[", r"\[")


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
