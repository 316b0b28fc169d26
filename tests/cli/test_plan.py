"""tutelx plan: what it prints, what it refuses, and traces by hand."""

import json
import subprocess
import sys

import pytest

from tests.tuning.test_cost import records
from tutelx.cli import _plan_trace, main
from tutelx.tuning.cost import SHEETS, Cost, RateModel
from tutelx.tuning.cost.question import Question
from tutelx.tuning.store import Database

SIZES = ["--gpus", "16", "--experts", "32", "--model-dim", "256", "--hidden-dim", "256", "--tokens", "1024"]


def asked(**change):
    sizes = {"gpus": 16, "node_size": 8, "experts": 8, "model_dim": 64, "hidden_dim": 64, "tokens": 1024}
    return Question(**{**sizes, **change})


def test_every_plan_and_the_best_of_them(capsys):
    assert main(["plan", *SIZES, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    # Degree 0 alone; degree 1 with 4 chunkings and 2 all-to-alls; each padded and ragged.
    assert len(found["plans"]) == 2 * (1 + 4 * 2)
    times = [plan["total"] for plan in found["plans"]]
    assert times == sorted(times)
    assert found["best"] == found["plans"][0]["plan"]
    assert found["over_scale"][0]["first"] == 1
    assert found["over_scale"][-1]["last"] == 16
    assert (found["over_capacity"][0]["first"], found["over_capacity"][-1]["last"]) == (1, 16)


def test_tables(capsys):
    assert main(["plan", *SIZES, "--top", "3", "--inference"]) == 0
    shown = capsys.readouterr().out
    assert "15 slower plans" in shown
    assert "forward; predicted" in shown
    assert main(["plan", "--published"]) == 0
    assert "560.9 ms" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--gpus", "4"], "--experts, --model-dim, --hidden-dim, --tokens must be given"),
        ([*SIZES, "--hardware", "abacus"], "hardware='abacus' is none of a100-hdr"),
        ([*SIZES, "--gpus", "0"], "gpus=0 must be at least 1"),
        ([*SIZES, "--gpus", "10000000"], "gpus=10000000 must be at most"),
        ([*SIZES, "--top-k", "33"], "top_k=33 exceeds experts=32"),
        ([*SIZES, "--capacity", "nan"], "capacity=nan must be positive"),
        ([*SIZES, "--dtype", "int8"], "dtype='int8' is none of"),
        ([*SIZES, "--top", "-1"], "--top=-1 must be at least 0"),
        ([*SIZES, "--trace", "no such file"], "'no such file' cannot be read"),
    ],
)
def test_what_it_refuses(argv, message, capsys):
    assert main(["plan", *argv]) == 2
    assert message in capsys.readouterr().err


def test_it_does_without_torch():
    code = f"import sys; from tutelx.cli import main; main({['plan', *SIZES]!r}); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.endswith("False\n"), done.stderr


class ByCapacity:
    """Padded takes a second for f below 2 and three from there; all else takes two."""

    def predict(self, workload, plan):
        padded = plan.layout == "padded" and plan.shard_degree == 0
        total = (1.0 if workload.capacity < 2 * 256 else 3.0) if padded else 2.0
        return Cost(total=total, compute=0.0, exchange=0.0, weights=0.0, memory=0.0)


def test_a_trace_by_hand():
    # Padded alone: 1 + 1 + 3 + 1 = 6; another alone: 8; the best of every step: 1 + 1 + 2 + 1 = 5, with two switches.
    steps = [asked(capacity=f) for f in (1.0, 1.5, 2.5, 1.0)]
    found = _plan_trace.simulate(steps, asked(), ByCapacity())
    assert (found.oracle, found.adaptive, found.switches) == (5, 5, 2)
    assert list(found.static.values())[:2] == [6, 8]
    # Buckets of a quarter octave: 1.75 and 1.99 are one, so the plan of the first serves both, and 2.1 is another.
    found = _plan_trace.simulate([asked(capacity=f) for f in (1.75, 1.99, 2.1)], asked(), ByCapacity())
    assert (found.oracle, found.adaptive) == (4, 4)


def test_traces_are_read(tmp_path, capsys):
    def read(name, text):
        path = tmp_path / name
        path.write_text(text)
        return [(step.capacity, step.tokens) for step in _plan_trace.read_trace(path, asked())]

    monitor = {"schema": 1, "needed_capacity_factor": 1.5, "tokens": 512, "plan": "ragged"}
    lines = [json.dumps(monitor), "2", "", json.dumps({**monitor, "needed_capacity_factor": None}), "0"]
    assert read("run.jsonl", "\n".join(lines)) == [(1.5, 512), (2.0, 1024)]
    assert read("a.csv", "step,needed_capacity_factor,tokens\n1,1.5,512\n2,2.5,\n") == [(1.5, 512), (2.5, 1024)]
    assert read("b.csv", "1.5\n2.5\n") == [(1.5, 1024), (2.5, 1024)]
    path = tmp_path / "trace.jsonl"
    path.write_text("1\n4\n")
    assert main(["plan", *SIZES, "--trace", str(path)]) == 0
    assert "trace of 2 steps, needed capacity 1 to 4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '1\n{"x": 2}', "line 2: neither a number"),
        ("a.jsonl", "1\n{", "line 2: Expecting"),
        ("a.jsonl", "[" * 100_000, "line 1: "),
        ("a.jsonl", "NaN", "line 1: capacity=nan"),
        ("a.jsonl", "1e999", "line 1: capacity=inf"),
        ("a.jsonl", "true", "must be numbers"),
        ("a.jsonl", '{"needed_capacity_factor": [1]}', "line 1: "),
        ("a.jsonl", '{"needed_capacity_factor": 1, "tokens": -3}', "tokens=-3 must be at least 1"),
        ("a.csv", "1\nx\n", "line 2: could not convert"),
        ("a.jsonl", "", "holds no step"),
    ],
)
def test_broken_traces_are_named(tmp_path, capsys, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    assert main(["plan", *SIZES, "--trace", str(path)]) == 2
    assert message in capsys.readouterr().err


def test_rates_come_from_a_database(tmp_path, capsys):
    database = Database.of_folders(tmp_path)
    for record in records(RateModel(SHEETS["cpu-gloo"])):
        database.add(record, layer=str(tmp_path))
    assert main(["plan", *SIZES, "--hardware", "cpu-gloo", "--db", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fit"] == {"timings": 9, "before": 0.0, "after": 0.0}
    assert main(["plan", *SIZES, "--hardware", "h100", "--db", str(tmp_path)]) == 2
    assert "holds no timing of a layer on 'cuda'" in capsys.readouterr().err
    assert main(["plan", *SIZES, "--db", str(tmp_path / "none")]) == 2
