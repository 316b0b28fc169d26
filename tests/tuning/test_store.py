"""Layers, appends from many sides at once, and what happens where nothing can be written."""

import multiprocessing
import os
import threading

import pytest

from tests.tuning.cases import BMM, GROUPED, candidate, key, record, write
from tutelx.errors import DatabaseError, InvalidValueError
from tutelx.tuning import files
from tutelx.tuning.parse import to_line
from tutelx.tuning.store import Database, Layer, standard_layers


def layered(tmp_path):
    return Database([Layer(name=name, root=tmp_path / name) for name in ("shipped", "site", "user")])


def only(database):
    [stored] = database.records()
    return stored


def test_a_later_layer_counts_more_plan_by_plan(tmp_path):
    write(tmp_path / "shipped", record(candidate(BMM, 0.5, n=100), candidate(GROUPED, 0.7)))
    write(tmp_path / "user", record(candidate(BMM, 0.9, n=3)))
    stored = only(layered(tmp_path))
    assert (stored.layer, stored.rank) == ("user", 2)
    # Within one layer 100 turns would have won over 3; GROUPED is known from below only.
    assert {plan: each.ratio for plan, each in stored.record.by_plan.items() if plan != stored.record.default} == {
        BMM: 0.9,
        GROUPED: 0.7,
    }


def test_what_was_once_wrong_is_not_made_right_by_a_later_layer(tmp_path):
    write(tmp_path / "shipped", record(candidate(BMM, 0.5, status="wrong", error=0.1)))
    write(tmp_path / "user", record(candidate(BMM, 0.4)))
    assert only(layered(tmp_path)).record.by_plan[BMM].status == "wrong"


def test_added_records_are_there_at_once_and_in_the_file(tmp_path):
    database = layered(tmp_path)
    assert database.records() == []
    before = database.version
    added = record(candidate(BMM, 0.5))
    database.add(added)
    assert database.version > before
    assert only(database).record.by_plan == added.by_plan
    assert only(layered(tmp_path)).layer == "user"
    database.add(record(at=key(tokens=64)), layer="process")
    assert len(database.records()) == 2
    assert len(layered(tmp_path).records()) == 1


def test_an_unknown_layer(tmp_path):
    with pytest.raises(InvalidValueError, match="layer='usr' is none of"):
        layered(tmp_path).add(record(), layer="usr")


def test_after_a_torn_line_comes_a_new_one(tmp_path):
    path = write(tmp_path, record())
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:50])
    Database.of_folders(tmp_path).add(record(at=key(tokens=64)), layer=str(tmp_path))
    database = Database.of_folders(tmp_path)
    assert sorted(stored.record.key.tokens for stored in database.records()) == [64, 1024]
    [problem] = database.problems
    assert (problem.path, problem.line) == (path, 2)


def write_many(root, writer, count):
    database = Database.of_folders(root)
    for i in range(count):
        database.add(record(at=key(tokens=1 + writer * count + i)), layer=str(root))


def test_writers_in_processes_and_threads_lose_nothing(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=write_many, args=(tmp_path, writer, 20)) for writer in range(3)]
    for process in processes:
        process.start()
    threads = [threading.Thread(target=write_many, args=(tmp_path, 3 + writer, 20)) for writer in range(2)]
    for thread in threads:
        thread.start()
    for each in (*processes, *threads):
        each.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    database = Database.of_folders(tmp_path)
    assert database.problems == []
    assert sorted(stored.record.key.tokens for stored in database.records()) == list(range(1, 101))


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "user").write_text("in the way")
    database = layered(tmp_path)
    with pytest.raises(DatabaseError, match="cannot be appended to"):
        database.add(record())
    assert len(database.records()) == 1


def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
    path = write(tmp_path / "user", record())
    before = path.read_bytes()
    write_all = os.write
    monkeypatch.setattr(files.os, "write", lambda handle, data: write_all(handle, data[:10]))
    database = layered(tmp_path)
    with pytest.raises(DatabaseError, match="no room"):
        database.add(record(at=key(tokens=64)))
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert len(database.records()) == 2


def test_a_file_that_somebody_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LOCK_SECONDS", 0.01)
    database = layered(tmp_path)
    path = write(tmp_path / "user", record())
    with files.locked(path), pytest.raises(DatabaseError, match="is held by another"):
        database.add(record(at=key(tokens=64)))


def test_no_home_no_user_layer():
    database = Database([Layer(name="user")])
    with pytest.raises(DatabaseError, match="has no folder here"):
        database.add(record())
    assert len(database.records()) == 1


def test_a_file_of_a_later_schema_is_refused_whole_and_left_alone(tmp_path):
    path = write(tmp_path / "user", record())
    path.write_bytes(path.read_bytes() + to_line(record()).replace(b'"schema":1', b'"schema":2'))
    before = path.read_bytes()
    database = layered(tmp_path)
    assert database.records() == []
    assert "schema 2; this tutelx reads up to 1" in str(database.problems[0])
    with pytest.raises(DatabaseError, match="later schema"):
        database.add(record(at=key(tokens=64)))
    assert path.read_bytes() == before
    assert len(database.records()) == 1


def test_standard_layers(monkeypatch, tmp_path):
    monkeypatch.setenv("TUTELX_TUNING_DB", os.pathsep.join(["/a", "/b"]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = [(layer.name, layer.root) for layer in standard_layers()]
    assert [name for name, _ in found] == ["shipped", "site2", "site", "user"]
    assert [str(root) for _, root in found[1:]] == ["/b", "/a", str(tmp_path / "tutelx" / "tuning_db")]
