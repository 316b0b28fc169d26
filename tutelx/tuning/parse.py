"""A record as one line of JSON, and back: nothing that is odd is taken for a measurement."""

from __future__ import annotations

import json
from dataclasses import MISSING, asdict, fields
from typing import Any, get_args

from tutelx.errors import InvalidValueError
from tutelx.tuning import strict
from tutelx.tuning.hardware import Hardware
from tutelx.tuning.key import Key
from tutelx.tuning.records import SCHEMA, Candidate, Record, Status, StoredPlan
from tutelx.types import AllToAll, ExpertKernel, Layout, Plan

OP = r"[a-z][a-z0-9_]{0,39}"
MOST_CANDIDATES = 4096

_SIZE = strict.integer(1, 2**40)
_TILE = strict.integer(1, 2**31 - 1)
_SECONDS = strict.number(0.0, 1e7)
_PLAN: tuple[dict[str, strict.Check], dict[str, strict.Check]] = (
    {
        "layout": strict.choice(*get_args(Layout)),
        "expert_kernel": strict.choice(*get_args(ExpertKernel)),
    },
    {
        "shard_degree": strict.integer(0, 2**20),
        "pipeline_degree": strict.integer(1, 2**10),
        "all_to_all": strict.choice(*get_args(AllToAll)),
        "tile_rows": _TILE,
        "tile_columns": _TILE,
    },
)
_KEY: tuple[dict[str, strict.Check], dict[str, strict.Check]] = (
    {
        "tokens": strict.integer(0, 2**40),
        "top_k": _SIZE,
        "load_factor": strict.number(0.0, 1e9),
        "num_experts": _SIZE,
        "model_dim": _SIZE,
        "hidden_dim": _SIZE,
        "expert_numbers": strict.integer(0, 2**50),
        "dtype": strict.text(r"[a-z][a-z0-9_]{0,39}"),
        "device": strict.choice("cpu", "cuda"),
        "training": strict.flag,
        "threads": strict.integer(1, 2**20),
    },
    {"world": strict.integer(1, 2**24), "ranks_per_node": strict.integer(1, 2**20)},
)
_CANDIDATE: tuple[dict[str, strict.Check], dict[str, strict.Check]] = (
    {
        "plan": lambda value, where: _plan(value, where),
        "median": _SECONDS,
        "iqr": _SECONDS,
        "n": strict.integer(0, 2**31),
        "ratio": strict.number(0.0, 1e9),
    },
    {
        "error": strict.number(0.0, 1e300),
        "status": strict.choice(*get_args(Status)),
        "spread": strict.number(0.0, 1e9),
    },
)
_RECORD: dict[str, strict.Check] = {
    "schema": strict.integer(1),
    "op": strict.text(OP),
    "hardware": lambda value, where: Hardware.from_json(value),
    "key": lambda value, where: Key(**strict.record(value, where, *_KEY)),
    "default": lambda value, where: _plan(value, where),
    "candidates": lambda value, where: _candidates(value, where),
    "software": strict.texts,
    "provenance": strict.texts,
}


class FutureSchema(InvalidValueError):
    """A line of a schema that a later tutelx writes: nothing of its file is used."""


def to_line(record: Record) -> bytes:
    """One line of ASCII with its line break. What has its default is left out; equal records give equal lines."""
    ordered = sorted(record.candidates, key=lambda c: (c.plan != record.default, c.plan.order))
    value = {
        "schema": record.schema,
        "op": record.op,
        "hardware": record.hardware.to_json(),
        "key": _set_fields(record.key),
        "default": _set_fields(record.default),
        "candidates": [{**_set_fields(each), "plan": _set_fields(each.plan)} for each in ordered],
        "software": dict(sorted(record.software.items())),
        "provenance": dict(sorted(record.provenance.items())),
    }
    return json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode("ascii") + b"\n"


def from_line(line: bytes) -> Record:
    """The record on a line.

    Raises:
        FutureSchema: its schema is later than SCHEMA.
        InvalidValueError: it is no record; says what is wrong with it.
    """
    value = strict.document(line)
    schema = value.get("schema") if isinstance(value, dict) else None
    if isinstance(schema, int) and not isinstance(schema, bool) and schema > SCHEMA:
        raise FutureSchema(f"schema {strict.short(schema)}; this tutelx reads up to {SCHEMA}")
    found = strict.record(value, "record", _RECORD, {})
    key: Key = found["key"]
    if key.device != found["hardware"].device:
        raise InvalidValueError(
            f"key.device={key.device!r} was measured on hardware.device={found['hardware'].device!r}"
        )
    return Record(**found)


def _plan(value: object, where: str) -> StoredPlan:
    found = StoredPlan(**strict.record(value, where, *_PLAN))
    try:
        found.plan(Plan())
    except InvalidValueError as error:
        raise InvalidValueError(f"{where}: {error}") from None
    return found


def _candidates(value: object, where: str) -> tuple[Candidate, ...]:
    if not isinstance(value, list) or not 1 <= len(value) <= MOST_CANDIDATES:
        raise InvalidValueError(f"{where}={strict.short(value)} is no list of 1 to {MOST_CANDIDATES} candidates")
    return tuple(_candidate(each, f"{where}[{i}]") for i, each in enumerate(value))


def _candidate(value: object, where: str) -> Candidate:
    found: dict[str, Any] = {"error": None, **strict.record(value, where, *_CANDIDATE)}
    try:
        return Candidate(**found)
    except InvalidValueError as error:
        raise InvalidValueError(f"{where}: {error}") from None


def _set_fields(value: Any) -> dict[str, Any]:
    """The fields of a dataclass that differ from their defaults."""
    absent = {each.name: None if each.default is MISSING else each.default for each in fields(value)}
    return {name: entry for name, entry in asdict(value).items() if entry is not None and entry != absent[name]}
