"""Two runs against each other, and the files they are kept in."""

import json

import pytest

from tests.bench.conftest import percent, record, row
from tutelx.bench import record as files
from tutelx.bench.compare import check_tolerance, compare
from tutelx.errors import InvalidValueError


def test_slower_beyond_the_tolerance_fails():
    before = record(row(**percent(80.0)), row(op="decode", **percent(80.0)), row(op="route", **percent(60.0)))
    now = record(row(**percent(60.0)), row(op="decode", **percent(70.0)), row(op="route", **percent(20.0)))
    found = compare(now, before, tolerance=1.15)
    assert [change.op for change in found.slower] == ["route", "encode"]  # decode: 1.143
    assert found.slower[0].ratio == pytest.approx(3.0)
    assert not found.passed
    assert compare(now, before, tolerance=3.01).passed


def test_equal_and_faster_pass():
    before = record(row(**percent(50.0)))
    assert compare(before, before, tolerance=1.0).passed
    assert compare(record(row(**percent(90.0))), before, tolerance=1.0).passed


def test_only_equal_op_shape_and_dtype_are_compared():
    shape = {"T": 5, "D": 8, "K": 2, "E": 4, "H": 16}
    now = record(row(), row(dtype="bfloat16", **percent(1.0)), row(shape=shape, **percent(1.0)))
    found = compare(now, record(row()), tolerance=1.15)
    assert found.passed
    assert len(found.changes) == 1
    assert found.unmatched == ("encode T4 D8 K2 E4 H16 bfloat16", "encode T5 D8 K2 E4 H16 float32")


def test_what_only_the_run_before_has_is_no_loss():
    assert compare(record(row()), record(row(), row(op="gate")), tolerance=1.15).passed


def test_what_was_measured_and_now_fails_is_lost():
    now = record(row(), row(op="gate", status="failed", error="kaput"))
    found = compare(now, record(row(), row(op="gate")), tolerance=1.15)
    assert found.lost == ("gate T4 D8 K2 E4 H16 float32: kaput",)
    assert not found.passed


def test_another_yardstick_is_not_compared():
    now = record(row(), row(op="layer", yardstick="GEMMs", **percent(1.0)))
    found = compare(now, record(row(), row(op="layer")), tolerance=1.15)
    assert found.passed
    assert "yardstick GEMMs, before copy" in found.unmatched[0]


def test_nothing_in_common_is_an_error():
    with pytest.raises(InvalidValueError, match="none of 1 rows is among the 1 measured before"):
        compare(record(row()), record(row(op="gate")), tolerance=1.15)
    with pytest.raises(InvalidValueError, match="none of 1 rows is among the 0"):
        compare(record(row()), record(row(status="failed")), tolerance=1.15)


def test_another_machine_and_a_half_run_are_noted():
    before = record(row(), complete=False)
    before["machine"] = {**before["machine"], "threads": 8}
    assert compare(record(row()), before, tolerance=1.15).notes == (
        "threads: 1, before 8",
        "the run before was interrupted",
    )


@pytest.mark.parametrize("tolerance", [0.99, 0.0, -1.0, float("nan"), float("inf")])
def test_a_wrong_tolerance(tolerance):
    with pytest.raises(InvalidValueError, match="must be a finite ratio of at least 1"):
        check_tolerance(tolerance)


def test_a_record_survives_its_file(tmp_path):
    path = tmp_path / "run.json"
    files.write(record(row(), row(op="gate")), path)
    assert files.read(path) == record(row(), row(op="gate"))
    assert len(path.read_text().splitlines()) == 10  # a line a key and a line a row
    files.write(record(), path)
    assert files.read(path)["rows"] == []
    assert [each.name for each in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ("[]", "is no record of tutelx bench"),
        ('{"schema": 1, "rows": []}', "is no record of tutelx bench"),
        (json.dumps({**record(), "schema": 99}), "has schema 99, this tutelx reads schema 1"),
    ],
)
def test_a_foreign_file_is_named(tmp_path, text, message):
    path = tmp_path / "foreign.json"
    path.write_text(text)
    with pytest.raises(InvalidValueError, match=message):
        files.read(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InvalidValueError, match=r"nowhere\.json' cannot be read: No such file"):
        files.read(tmp_path / "nowhere.json")
