"""Schedulers and the files that they read and write: whatever stands there, the numbers stay."""

import json
import logging

import pytest
import torch

from tests.cases import tensor
from tests.scheduler.cases import BMM, DEFAULT, HARDWARE, candidate, known, record, workload
from tests.scheduler.test_online import Told, train
from tutelx import MoE, Scheduler
from tutelx.errors import InvalidTypeError
from tutelx.planner import RulePlanner
from tutelx.scheduler import sources
from tutelx.tuning.key import Key
from tutelx.tuning.parse import to_line
from tutelx.tuning.store import Database


def stored(folder, *records):
    database = Database.of_folders(folder)
    for each in records:
        database.add(each, str(folder))
    return folder


def test_a_folder(tmp_path):
    folder = stored(tmp_path / "db", record(candidate(BMM, 0.7)))
    for db in (folder, str(folder), [tmp_path / "none", folder]):
        decision = Scheduler(db, hardware=HARDWARE).plan(workload())
        assert (decision.plan.expert_kernel, decision.source) == ("bmm", "exact")
    with pytest.raises(InvalidTypeError, match="db is int"):
        Scheduler(3)


def damaged(line: bytes) -> dict[str, bytes]:
    value = json.loads(line)

    def changed(**fields) -> bytes:
        return json.dumps({**value, **fields}).encode() + b"\n"

    return {
        "truncated": line[: len(line) // 2],
        "binary": bytes(range(256)) * 9,
        "nested": b"[" * 100_000 + b"]" * 100_000 + b"\n",
        "not a number": line.replace(b'"ratio":0.7', b'"ratio":NaN'),
        "infinite": line.replace(b'"ratio":0.7', b'"ratio":-1e999'),
        "huge": line.replace(b'"n":9', b'"n":' + b"9" * 4000),
        "negative": line.replace(b'"ratio":0.7', b'"ratio":-0.7'),
        "types": changed(candidates={"plan": 3}),
        "another schema": changed(schema=99),
        "impossible": line.replace(b'"expert_kernel":"bmm"', b'"expert_kernel":"../../bmm"'),
        "ranks": line.replace(b'"layout":"padded"', b'"layout":"padded","shard_degree":4,"pipeline_degree":1024'),
    }


@pytest.mark.parametrize("kind", damaged(to_line(record(candidate(BMM, 0.7)))))
def test_hostile_databases_change_no_number(tmp_path, kind):
    folder = stored(tmp_path / "db", record(candidate(BMM, 0.7)))
    (path,) = folder.rglob("*.jsonl")
    whole = path.read_bytes()
    path.write_bytes(damaged(whole)[kind])
    assert path.read_bytes() != whole
    scheduler = Scheduler(folder, hardware=HARDWARE)
    assert scheduler.plan(workload()).plan == RulePlanner().plan(workload()).plan
    torch.manual_seed(0)
    layer = MoE(8, 16, 4, planner=scheduler, dtype=torch.float64)
    x = tensor(12, 8, dtype=torch.float64)
    y = layer(x)
    layer.planner = RulePlanner()
    assert torch.equal(layer(x), y)


def test_a_database_that_cannot_be_opened_is_reported(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(Database, "records", lambda self: 1 / 0)
    with caplog.at_level(logging.ERROR, "tutelx"):
        decision = Scheduler(tmp_path).plan(workload())
    assert decision.source == "default"
    assert "the tuning database cannot be used" in caplog.text


def explored(db, monkeypatch):
    monkeypatch.setattr(sources, "possible_plans", lambda w: [BMM.plan(RulePlanner().plan(w).plan)])
    torch.manual_seed(3)
    layer = MoE(8, 16, 4, dtype=torch.float64, planner=Told(db))
    x = tensor(12, 8, dtype=torch.float64)
    with torch.no_grad():
        for _ in range(8):
            layer(x)
    return layer.last_decision


def test_what_was_explored_is_written_and_found_again(tmp_path, monkeypatch):
    folder = tmp_path / "db"
    found = explored(folder, monkeypatch)
    assert (found.source, found.plan.expert_kernel) == ("online", "bmm")
    ((written,),) = [[s.record for s in Database.of_folders(folder).records()]]
    assert written.key == Key.of(found.workload)
    assert written.provenance["source"] == "online"
    assert {c.plan: (c.ratio, c.n, c.error) for c in written.candidates} == {
        DEFAULT: (1.0, 2, None),
        BMM: (0.5, 2, None),
    }
    again = Scheduler(folder, hardware=HARDWARE).plan(found.workload)
    assert (again.source, again.plan, again.measured_seconds) == ("exact", found.plan, pytest.approx(0.5))


def test_what_cannot_be_written_is_known_all_the_same(tmp_path, monkeypatch, caplog):
    (tmp_path / "db").write_text("no folder")
    with caplog.at_level(logging.WARNING, "tutelx"):
        found = explored(tmp_path / "db", monkeypatch)
    assert (found.source, found.plan.expert_kernel) == ("online", "bmm")
    assert "what was explored is not written" in caplog.text


def test_training_with_records_has_the_numbers_of_training_without():
    x = workload(tokens=12, top_k=2, num_experts=4, model_dim=8, hidden_dim=16, dtype="float64", demand=9, threads=1)
    near = record(candidate(BMM, 0.5), key=Key.of(x))
    torch.manual_seed(3)
    tuned = MoE(8, 16, 4, dtype=torch.float64, planner=Scheduler(known(near)))
    torch.manual_seed(3)
    plain = MoE(8, 16, 4, dtype=torch.float64, planner=RulePlanner())
    losses = [torch.tensor(train(layer, 4)[0]) for layer in (tuned, plain)]
    torch.testing.assert_close(*losses, rtol=1e-9, atol=0)
