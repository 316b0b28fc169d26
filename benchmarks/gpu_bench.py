"""The benchmarks of make gpu-check: the shapes that the ops are held to on a GPU, into one record a card."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from tutelx.bench import machine, record
from tutelx.bench.rows import Row
from tutelx.bench.settings import OPS, Settings
from tutelx.bench.shapes import Shape
from tutelx.bench.suite import Suite
from tutelx.errors import InvalidValueError

TARGET = 80.0  # percent of a copy of the same bytes
HELD_TO_IT = ("encode", "encode_backward", "decode", "decode_backward")
DEVICE = "cuda"
SECONDS = 0.3  # of timing a row; setting it up takes several times as long

TOKENS, DIMS, CHOICES = (4096, 16384, 65536), (2048, 7168), (1, 2, 8)
_ROWS = tuple(Shape(T=T, D=D, K=K, E=64) for T in TOKENS for D in DIMS for K in CHOICES)
_SLOTS = tuple(Shape(T=T, D=2048, K=K, E=64) for T in TOKENS for K in CHOICES)
_EXPERTS = tuple(Shape(T=T, D=2048, K=K, E=64, H=1408) for T in TOKENS[:2] for K in (2, 8))
_ONE = (Shape(T=1, D=2048, K=2, E=64, H=1408),)

SHAPES: dict[str, tuple[Shape, ...]] = {
    **dict.fromkeys(HELD_TO_IT, (*_ONE, *_ROWS)),
    **dict.fromkeys(("gate", "gate_backward", "route"), (*_ONE, *_SLOTS)),
    **dict.fromkeys(("activation", "activation_backward", "expert_ffn", "layer"), (*_ONE, *_EXPERTS)),
}


def run(folder: Path, ops: Sequence[str], *, deadline: float) -> dict[str, str]:
    """Status and detail of the stage. The record is written after every row, so that a kill loses nothing; rows of an
    earlier run on the same machine stay in it until they are measured again."""
    chosen = tuple(ops) or tuple(SHAPES)
    unknown = [op for op in chosen if op not in SHAPES]
    if unknown:
        raise InvalidValueError(f"op {unknown[0]!r} is none of {', '.join(SHAPES)}")
    rows: list[Row] = []
    planned = sum(len(SHAPES[op]) for op in chosen)
    path = folder / f"{slug(machine.describe(torch.device(DEVICE))['device_name'])}.json"
    before = earlier(path)
    for row in measured(chosen):
        rows.append(row)
        write(path, rows, before)
        print(f"[{len(rows)}/{planned}] {line(row)}", flush=True)
        if time.monotonic() > deadline:
            break
    return outcome(rows, planned, path)


def measured(ops: Sequence[str]) -> Iterator[Row]:
    for op in ops:
        for shape in SHAPES[op]:
            settings = Settings(
                ops=(op,), shapes=(shape,), dtypes=("bfloat16",), peers=(), device=DEVICE, seconds=SECONDS
            )
            suite = Suite.of(settings)
            suite.run(lambda name: None, lambda row: None)
            yield from suite.rows


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def earlier(path: Path) -> record.Run | None:
    """What lies there, if it was measured by these versions on such a machine."""
    if not path.exists():
        return None
    found, now = record.read(path), machine.describe(torch.device(DEVICE))
    same = all(found["machine"].get(name) == now[name] for name in ("device_name", "torch", "tutelx"))
    return found if same else None


def write(path: Path, rows: Sequence[Row], before: record.Run | None) -> None:
    run = record.run_as_json(
        rows, machine=machine.describe(torch.device(DEVICE)), command=sys.argv, missing={}, complete=False
    )
    if before is not None:
        new = {key(row) for row in run["rows"]}
        kept = [row for row in before["rows"] if key(row) not in new]
        run["rows"] = sorted([*kept, *run["rows"]], key=lambda row: OPS.index(row["op"]))
    run["complete"] = {key(row) for row in run["rows"]} >= everything()
    record.write(run, path)


def key(row: dict) -> tuple:
    return row["op"], tuple(sorted(row["shape"].items())), row["dtype"]


def everything() -> set[tuple]:
    return {(op, tuple(sorted(vars(shape).items())), "bfloat16") for op, shapes in SHAPES.items() for shape in shapes}


def line(row: Row) -> str:
    name = f"{row.op} {row.shape}"
    if row.status != "ok":
        return f"{name}: {row.status}, {row.error}"
    _, median, _ = row.percent_of_yardstick()
    ours, yardstick = row.one("ours").stats.median, row.one("yardstick").name
    return f"{name}: {ours * 1e6:.1f} us, {row.must_move / ours / 1e9:.0f} GB/s, {median:.0f}% of the {yardstick}"


def outcome(rows: Sequence[Row], planned: int, path: Path) -> dict[str, str]:
    """A row that is wrong or not measured fails; one below the target is named."""
    parts = [f"{len(rows)} of {planned} rows in {path}"]
    # A single token measures the launch.
    held = [row for row in rows if row.status == "ok" and row.op in HELD_TO_IT and row.shape.T > 1]
    if held:
        percents = {f"{row.op} {row.shape}": row.percent_of_yardstick()[1] for row in held}
        reached = sum(percent >= TARGET for percent in percents.values())
        worst = min(percents, key=lambda name: percents[name])
        parts.append(f"{reached} of {len(held)} at {TARGET:.0f}% of a copy or more")
        parts.append(f"least {worst}: {percents[worst]:.0f}%")
    wrong = [f"{row.op} {row.shape}" for row in rows if row.status != "ok"]
    if wrong:
        parts.append(f"not measured: {'; '.join(wrong)}")
    if len(rows) < planned:
        parts.append("out of time: run the others with OPS=...")
    return {"status": "failed" if wrong or len(rows) < planned else "passed", "detail": "; ".join(parts)}
