"""`tutelx bench` from its flags to its files, at tiny sizes."""

import dataclasses
import json
import signal

import pytest
from matplotlib.image import imread

from tutelx.bench import figure, machine, suite
from tutelx.bench.settings import GATES, OPS, chosen_ops
from tutelx.bench.subjects import SUBJECTS
from tutelx.cli import main

TINY = ("--sizes", "T=5,D=8,K=2,E=4,H=8", "--seconds", "0.001", "--threads", "1")
ROW_KEYS = [
    *("op", "shape", "dtype", "status", "error", "must_move_bytes", "flops", "relative_error", "skipped"),
    *("working_set", "yardstick", "contenders", "gb_per_s", "gflop_per_s", "percent_of_yardstick", "speed_up"),
]


@pytest.fixture(autouse=True)
def _small_cache(monkeypatch):
    monkeypatch.setattr(machine, "last_level_cache", lambda device: 4096)


def bench(*arguments) -> int:
    return main(["bench", *map(str, arguments)])


def test_every_op_to_json_and_picture(tmp_path, capsys):
    assert bench(*TINY, "--json", tmp_path / "a.json", "--plot", tmp_path / "a.png") == 0
    run = json.loads((tmp_path / "a.json").read_text())
    assert list(run) == ["schema", "kind", "complete", "command", "machine", "missing_peers", "rows"]
    assert (run["schema"], run["complete"], run["command"][0]) == (1, True, "tutelx")
    assert [row["op"] for row in run["rows"]] == list(OPS)
    assert run["machine"]["threads"] == 1
    for row in run["rows"]:
        assert list(row) == ROW_KEYS
        ours, yardstick, *others = row["contenders"]
        assert (ours["kind"], yardstick["kind"], yardstick["name"]) == ("ours", "yardstick", row["yardstick"])
        assert row["gb_per_s"] == pytest.approx(row["must_move_bytes"] / ours["median_s"] / 1e9)
        assert row["speed_up"] == pytest.approx({each["name"]: each["median_s"] / ours["median_s"] for each in others})
        assert ours["n"] >= 3
        assert (row["gflop_per_s"] is None) == (row["flops"] is None)
    assert imread(tmp_path / "a.png").shape[1] > 1000
    shown = capsys.readouterr().out
    for op in OPS:
        assert f"\n{op} " in shown
    assert "% of copy" in shown
    assert "% of GEMMs" in shown


def test_gate_stands_for_every_gate():
    assert chosen_ops([]) == OPS
    assert chosen_ops(["route", "gate", "gate_switch", "route"]) == ("route", "gate", *GATES)
    assert chosen_ops(["gate_switch"]) == ("gate_switch",)


def test_chosen_ops_sizes_and_dtypes(tmp_path):
    code = bench("route", "encode", *TINY, "--sizes", "T=1,E=2,D=4", "--dtype", "bfloat16", "--dtype", "float64",
                 "--peers", "none", "--json", tmp_path / "a.json")  # fmt: skip
    run = json.loads((tmp_path / "a.json").read_text())
    assert code == 0
    assert run["missing_peers"] == {}
    assert [(row["op"], row["shape"]["T"], row["dtype"]) for row in run["rows"]] == [
        (op, tokens, dtype) for op in ("route", "encode") for tokens in (5, 1) for dtype in ("bfloat16", "float64")
    ]


def test_against_itself_and_against_a_better_past(tmp_path, capsys):
    path = tmp_path / "a.json"
    assert bench("encode", *TINY, "--save", path) == 0
    assert bench("encode", *TINY, "--against", path, "--tolerance", "1000") == 0
    assert "1 rows compared, tolerance x 1000: no row is slower" in capsys.readouterr().out
    run = json.loads(path.read_text())
    run["rows"][0]["percent_of_yardstick"]["median"] = 1e9
    path.write_text(json.dumps(run))
    assert bench("encode", *TINY, "--against", path) == 1
    assert "1 slower, 0 lost" in capsys.readouterr().out


def test_a_wrong_op_fails_the_run_and_the_others_are_measured(monkeypatch, tmp_path, capsys):
    ours = SUBJECTS["encode"].ours
    wrong = dataclasses.replace(SUBJECTS["encode"], ours=lambda inputs: ours(inputs) * 1.01)
    monkeypatch.setitem(SUBJECTS, "encode", wrong)
    assert bench("encode", "route", *TINY, "--json", tmp_path / "a.json") == 1
    encode, route = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert (encode["status"], route["status"]) == ("failed", "ok")
    assert "differs from ours: relative error 9.9e-03, allowed 1e-05" in encode["error"]
    assert "FAILED encode" in capsys.readouterr().out


def test_an_interrupt_keeps_what_was_measured(monkeypatch, tmp_path, capsys):
    measure, calls = suite.measure, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return measure(*args, **kwargs)

    monkeypatch.setattr(suite, "measure", interrupted)
    assert bench(*TINY, "--json", tmp_path / "a.json", "--plot", tmp_path / "a.png") == 130
    run = json.loads((tmp_path / "a.json").read_text())
    assert (run["complete"], [row["op"] for row in run["rows"]]) == (False, list(OPS[:2]))
    assert (tmp_path / "a.png").exists()
    assert "interrupted" in capsys.readouterr().out


def test_an_interrupt_before_the_first_row_leaves_valid_files(monkeypatch, tmp_path):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(suite, "measure", interrupted)
    assert bench(*TINY, "--json", tmp_path / "a.json", "--plot", tmp_path / "a.png") == 130
    assert json.loads((tmp_path / "a.json").read_text())["rows"] == []
    assert imread(tmp_path / "a.png").size


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["encod"], "op 'encod' is none of linear, gate, gate_backward, route, encode, encode_backward, decode"),
        (["--sizes", "T=x"], "T='x' is not a positive whole number"),
        (["--peers", "tutle"], "peer 'tutle' is none of liger, scattermoe, transformers"),
        (["--tolerance", "0.5"], "tolerance=0.5 must be a finite ratio of at least 1"),
        (["--json", "/nowhere/a.json"], "'/nowhere/a.json' is a folder or lies in none"),
        (["--plot", "."], "'.' is a folder or lies in none"),
        (["--against", "/nowhere/a.json"], "'/nowhere/a.json' cannot be read: No such file"),
        (["--seconds", "0"], "seconds=0.0 must be positive"),
    ],
)
def test_wrong_use_is_one_line_before_anything_is_measured(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(suite, "measure", None)
    assert bench(*arguments) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("tutelx bench: ")
    assert message in printed
    assert printed.count("\n") == 1


def test_cuda_without_a_device_is_wrong_use(monkeypatch, capsys):
    monkeypatch.setattr(suite.torch.cuda, "is_available", lambda: False)
    assert bench("route", *TINY, "--device", "cuda") == 2
    assert "torch finds no CUDA device" in capsys.readouterr().err


def test_threads_are_set_back():
    before = suite.torch.get_num_threads()
    with suite._threads(before + 1):
        assert suite.torch.get_num_threads() == before + 1
    assert suite.torch.get_num_threads() == before


def test_a_picture_of_many_kinds_of_rows(tmp_path):
    contender = {"median_s": 1.0, "kind": "peer", "name": "a peer"}
    row = {
        "op": "layer",
        "shape": {"T": 1},
        "dtype": "float32",
        "status": "ok",
        "yardstick": "GEMMs",
        "percent_of_yardstick": {"median": 900.0, "q1": 901.0, "q3": 899.0},
        "contenders": [contender],
        "speed_up": {"a peer": 3e4},
    }
    about = {"device_name": "x", "threads": 1, "torch": "2"}
    run = {"complete": False, "machine": about, "rows": [row, {**row, "status": "failed"}, {**row, "op": "gate"}]}
    figure.draw(run, tmp_path / "a.png")
    assert imread(tmp_path / "a.png").size
