"""Lines that are records, and everything else that may stand in a file."""

import json
import os
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tuning.cases import BMM, DEFAULT, HERE, candidate, key, on, record, workload, write
from tutelx.errors import InvalidValueError
from tutelx.planner import RulePlanner
from tutelx.tuning import files
from tutelx.tuning.lookup import Lookup
from tutelx.tuning.parse import FutureSchema, from_line, to_line
from tutelx.tuning.store import Database

GOOD = record(
    candidate(BMM, 0.5, iqr=0.01, spread=0.02),
    candidate(replace(DEFAULT, tile_rows=64, tile_columns=256), 1.5, status="slow", error=None),
    candidate(replace(BMM, pipeline_degree=4, all_to_all="2dh", shard_degree=0), 0.0, n=0, status="wrong", error=None),
    at=key(world=4, ranks_per_node=2),
)
LINE = to_line(GOOD)


def changed(path, value):
    """The line with one entry, such as "key.tokens" or "candidates.1.n", replaced; value: ...: removed."""
    whole = json.loads(LINE)
    at = whole
    *outer, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    for part in outer:
        at = at[part]
    if value is ...:
        del at[last]
    else:
        at[last] = value
    return json.dumps(whole).encode()


def test_a_record_and_back():
    again = from_line(LINE)
    assert (again.hardware, again.key, again.default) == (GOOD.hardware, GOOD.key, GOOD.default)
    assert again.by_plan == GOOD.by_plan
    assert (again.software, again.provenance, again.hardware.aliases) == (
        GOOD.software,
        GOOD.provenance,
        GOOD.hardware.aliases,
    )
    assert to_line(again) == LINE
    assert LINE.count(b"\n") == 1
    assert LINE.endswith(b"\n")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("schema", 0, "schema"),
        ("schema", True, "schema"),
        ("schema", "1", "schema"),
        ("schema", ..., "has no 'schema'"),
        ("op", "../layer", "op"),
        ("op", "", "op"),
        ("colour", 1, "unknown field 'colour'"),
        ("hardware.arch", "../../x", "arch"),
        ("hardware.units", 10**30, "an integer of 100 bits"),
        ("key.tokens", -1, "tokens"),
        ("key.tokens", 2.0, "tokens"),
        ("key.tokens", True, "tokens"),
        ("key.training", 1, "training"),
        ("key.load_factor", "1", "load_factor"),
        ("key.device", "cuda", "was measured on"),
        ("key.dtype", "float32\x00", "printable"),
        ("key", [], "a list of 0 is no object"),
        ("default", {"layout": "ragged", "expert_kernel": "grouped"}, "is not among"),
        ("default.layout", "weird", "layout"),
        ("candidates", [], "candidates"),
        ("candidates", {}, "candidates"),
        ("candidates.0.n", 0, "cannot have been measured"),
        ("candidates.0.n", 1.5, "n=1.5"),
        ("candidates.0.median", 0, "cannot have been measured"),
        ("candidates.0.median", -1.0, "median"),
        ("candidates.0.median", False, "median"),
        ("candidates.0.ratio", 1e300, "ratio"),
        ("candidates.0.ratio", None, "ratio"),
        ("candidates.0.status", "fine", "status"),
        ("candidates.1.plan", {"layout": "ragged", "expert_kernel": "tiled"}, "twice"),
        ("candidates.1.plan", {"layout": "ragged", "expert_kernel": "bmm"}, "needs layout='padded'"),
        ("candidates.1.plan.pipeline_degree", 0, "pipeline_degree"),
        ("candidates.1.plan.tile_rows", 2**40, "tile_rows"),
        ("software.torch", 2, "torch"),
        ("software", {str(i): "" for i in range(1000)}, "software"),
        ("provenance.command", "\x1b]0;title\x07", "printable"),
        ("provenance.command", "\ud800", "printable"),
        ("provenance.command", "x" * 5000, "printable"),
    ],
)
def test_a_line_with_one_thing_wrong(path, value, message):
    with pytest.raises(InvalidValueError, match="^.*" + message.replace("(", r"\(")):
        from_line(changed(path, value))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"", "no JSON"),
        (b"null", "is no object"),
        (b"[" * 100_000, "nested deeper"),
        (b'{"a":' * 100_000, "nested deeper"),
        (b'{"schema":1,"schema":1}', "'schema' stands there twice"),
        (b'{"schema":NaN}', "NaN is no number"),
        (b'{"schema":-Infinity}', "Infinity is no number"),
        (b'{"schema":1e999}', "too large"),
        (b'{"schema":' + b"9" * 5000 + b"}", "no JSON"),
        (b'"\xff"', "byte 1 is not UTF-8"),
        (b"\x00" * 50, "no JSON"),
        (LINE[:-20], "no JSON"),
        (LINE + LINE, "no JSON"),
        (LINE.replace(b'"n":9', b'"n":9e0', 1), "is no integer"),
        (LINE.replace(b'"n":9', b'"n":1' + b"0" * 400, 1), "bits"),
    ],
)
def test_lines_that_are_no_records(line, message):
    with pytest.raises(InvalidValueError, match=message):
        from_line(line)


@pytest.mark.parametrize("schema", [2, 10**9])
def test_a_later_schema_is_refused_before_anything_else_is_looked_at(schema):
    with pytest.raises(FutureSchema, match=f"schema {schema}; this tutelx reads up to 1"):
        from_line(json.dumps({"schema": schema, "whatever": [1]}).encode())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=20,
)
PATHS = ["schema", "op", "hardware", "key", "default", "candidates", "software", "provenance", "hardware.units"]
PATHS += ["hardware.aliases", "key.tokens", "key.world", "candidates.0", "candidates.1.plan", "candidates.1.median"]


def survives(line):
    """It is refused with a reason, or it is a record that is written and read again as the same."""
    try:
        found, reason = from_line(line), ""
    except InvalidValueError as error:
        found, reason = None, str(error)
    assert reason == "" or (reason.isprintable() and len(reason) < 1000)
    if found is not None:
        assert to_line(from_line(to_line(found))) == to_line(found)


@given(st.sampled_from(PATHS), JSON)
def test_any_value_anywhere(path, value):
    survives(changed(path, value))


@given(st.binary(max_size=200))
def test_any_bytes(data):
    survives(data)


@given(st.integers(0, len(LINE) - 2), st.binary(max_size=3), st.integers(0, 5))
def test_any_damage_to_a_good_line(at, put, cut):
    survives(LINE[:at] + put + LINE[at + cut :])


def test_a_file_with_everything_in_it(tmp_path, caplog):
    path = write(tmp_path, record())
    good = to_line(record(at=key(tokens=64)))
    lines = [
        b"\xef\xbb\xbf" + to_line(record()).rstrip() + b"\r\n",  # as an editor of Windows leaves it
        b"\n   \n",
        b"# a comment\n",
        b'"' + b"x" * (3 * files.LONGEST_LINE) + b'"\n',
        b"\x00\x00\n",
        good,
        good[:30],
    ]
    path.write_bytes(b"".join(lines))
    database = Database.of_folders(tmp_path)
    assert sorted(stored.record.key.tokens for stored in database.records()) == [64, 1024]
    assert [problem.line for problem in database.problems] == [4, 5, 6, 8]
    assert "longer than" in database.problems[1].reason
    assert caplog.text.count(str(path)) == 4
    Database.of_folders(tmp_path).records()
    assert caplog.text.count(str(path)) == 4  # once is enough


def test_nothing_outside_of_the_folder_is_read(tmp_path):
    outside, root = tmp_path / "outside", tmp_path / "root"
    elsewhere = write(outside, record())
    root.mkdir()
    (root / "cpu-linked").symlink_to(elsewhere.parent)
    inside = root / HERE.folder
    inside.mkdir()
    (inside / "layer.jsonl").symlink_to(elsewhere)
    database = Database.of_folders(root)
    assert (database.records(), database.problems) == ([], [])
    os.unlink(inside / "layer.jsonl")
    (inside / "layer.jsonl").symlink_to(inside / "layer.jsonl")  # to itself
    os.mkfifo(inside / "encode.jsonl")
    database = Database.of_folders(root)
    assert database.records() == []
    assert any("is no file" in problem.reason for problem in database.problems)


def test_a_link_is_not_written_through(tmp_path):
    target = tmp_path / "precious"
    target.write_text("precious")
    root = tmp_path / "root"
    (root / HERE.folder).mkdir(parents=True)
    (root / HERE.folder / "layer.jsonl").symlink_to(target)
    with pytest.raises(OSError, match="cannot be appended"):
        Database.of_folders(root).add(record(), layer=str(root))
    assert target.read_text() == "precious"


def test_a_record_in_another_machines_folder_is_a_problem(tmp_path):
    path = write(tmp_path, record())
    path.write_bytes(to_line(record(hardware=on(HERE, units=64))))
    database = Database.of_folders(tmp_path)
    assert database.records() == []
    assert "belongs into cpu-x86_64-avx512-64c-32m/layer.jsonl" in database.problems[0].reason


def test_a_hostile_database_answers_with_the_default(tmp_path):
    path = write(tmp_path, record())
    path.write_bytes(b"[" * 10_000 + b"\n" + changed("candidates.0.ratio", 1e999) + b"\n" + LINE[:100])
    asked = workload()
    rule = RulePlanner().plan(asked)
    answer = Lookup(Database.of_folders(tmp_path), HERE).find(key(), asked, rule)
    assert (answer.tier, answer.plan) == ("default", rule.plan)
