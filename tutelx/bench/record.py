"""One run as a JSON file: the machine, the command, the rows."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tutelx.bench.rows import Measured, Row
from tutelx.errors import InvalidValueError

SCHEMA = 1

Run = dict[str, Any]


def run_as_json(
    rows: Sequence[Row], *, machine: dict[str, Any], command: Sequence[str], missing: dict[str, str], complete: bool
) -> Run:
    """missing: peers that could not be used, and why."""
    return {
        "schema": SCHEMA,
        "kind": "tutelx bench",
        "complete": complete,
        "command": list(command),
        "machine": machine,
        "missing_peers": missing,
        "rows": [row_as_json(row) for row in rows],
    }


def row_as_json(row: Row) -> dict[str, Any]:
    head = {
        "op": row.op,
        "shape": asdict(row.shape),
        "dtype": row.dtype,
        "status": row.status,
        "error": row.error,
        "must_move_bytes": row.must_move,
        "flops": row.flops,
        "relative_error": row.relative_error,
        "skipped": row.skipped,
    }
    if row.status != "ok":
        return head
    assert row.working_set is not None, "a row that was measured has a working set"
    ours = row.one("ours").stats.median
    q1, median, q3 = row.percent_of_yardstick()
    others = [each.name for each in row.measured if each.kind not in ("ours", "yardstick")]
    return {
        **head,
        "working_set": asdict(row.working_set),
        "yardstick": row.one("yardstick").name,
        "contenders": [_contender(each) for each in row.measured],
        "gb_per_s": row.must_move / ours / 1e9,
        "gflop_per_s": None if row.flops is None else row.flops / ours / 1e9,
        "percent_of_yardstick": {"median": median, "q1": q1, "q3": q3},
        "speed_up": {name: row.speed_up(name) for name in others},
    }


def _contender(measured: Measured) -> dict[str, Any]:
    stats = measured.stats
    return {
        "name": measured.name,
        "kind": measured.kind,
        "median_s": stats.median,
        "iqr_s": stats.iqr,
        "q1_s": stats.q1,
        "q3_s": stats.q3,
        "n": stats.n,
        "calls_per_sample": stats.calls_per_sample,
    }


def write(run: Run, path: Path) -> None:
    """One line a row. Replaced as a whole, so that a reader never meets half a file."""
    lines = [f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in run.items() if key != "rows"]
    rows = ",\n".join(json.dumps(row, allow_nan=False) for row in run["rows"])
    lines.append(f'"rows": [\n{rows}\n]')
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise InvalidValueError(f"{str(path)!r} cannot be written: {error.strerror}") from None
    finally:
        partial.unlink(missing_ok=True)


def read(path: Path) -> Run:
    """Raises InvalidValueError for a file that is none of ours."""
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidValueError(f"{str(path)!r} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise InvalidValueError(f"{str(path)!r} is no JSON: {error}") from None
    if not isinstance(run, dict) or run.get("kind") != "tutelx bench" or not isinstance(run.get("rows"), list):
        raise InvalidValueError(f"{str(path)!r} is no record of tutelx bench")
    if run.get("schema") != SCHEMA:
        raise InvalidValueError(f"{str(path)!r} has schema {run.get('schema')}, this tutelx reads schema {SCHEMA}")
    return run
