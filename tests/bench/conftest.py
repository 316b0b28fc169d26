"""One thread, and rows made by hand."""

from collections.abc import Iterator

import pytest

from tests.threads import one_thread

ROW = {
    "op": "encode",
    "shape": {"T": 4, "D": 8, "K": 2, "E": 4, "H": 16},
    "dtype": "float32",
    "status": "ok",
    "error": None,
    "yardstick": "copy",
    "percent_of_yardstick": {"median": 80.0, "q1": 78.0, "q3": 82.0},
}


def row(**changes) -> dict:
    return {**ROW, **changes}


def percent(median: float) -> dict:
    return {"percent_of_yardstick": {"median": median, "q1": median, "q3": median}}


def record(*rows: dict, **changes) -> dict:
    """What `record.read` gives, as far as a comparison reads it."""
    machine = {"device_name": "a", "threads": 1, "last_level_cache": 1, "torch": "2"}
    return {"schema": 1, "kind": "tutelx bench", "complete": True, "machine": machine, "rows": list(rows), **changes}


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield
