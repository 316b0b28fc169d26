"""`tutelx tune` from its flags to its files, at tiny sizes, on a machine that is made up."""

import dataclasses
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from matplotlib.image import imread

import tutelx
from tests.tuner.machines import HARDWARE, machine
from tutelx.cli import _tune_ranks, main
from tutelx.tuner.machine import Machine
from tutelx.tuner.search import Search
from tutelx.tuning.store import Database

LAYER = ("--model-dim", "8", "--hidden-dim", "16", "--num-experts", "4")
TINY = (*LAYER, "--tokens", "8..16", "--top-k", "1", "--capacity", "1", "--seconds", "0.001", "--device", "cpu")


@pytest.fixture(autouse=True)
def _made_up(monkeypatch):
    monkeypatch.setattr(Machine, "here", classmethod(lambda cls, device, group=None: machine()))
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def run(*arguments) -> int:
    return main(["tune", *map(str, arguments)])


def test_from_flags_to_files_and_again(tmp_path, monkeypatch, capsys):
    files = ("--db", tmp_path / "db", "--json", tmp_path / "a.json", "--plot", tmp_path / "a.png")
    assert run(*TINY, *files) == 0
    shown = capsys.readouterr().out
    assert "T8 K1 load 1 M8 H16 E4 gated float32 training" in shown
    assert "2 workloads measured, 0 known before" in shown
    whole = json.loads((tmp_path / "a.json").read_text())
    assert (whole["kind"], whole["complete"], whole["failed"]) == ("tutelx tune", True, {})
    assert whole["command"].startswith("tutelx tune --model-dim 8")
    assert str(tmp_path) not in (tmp_path / "a.json").read_text()
    assert [record["key"]["tokens"] for record in whole["records"]] == [8, 16]
    assert imread(tmp_path / "a.png").shape[1] > 1000
    stored = [each.record for each in Database.of_folders(tmp_path / "db").records()]
    assert sorted(record.key.tokens for record in stored) == [8, 16]
    for record in stored:
        assert record.hardware == HARDWARE
        assert record.provenance["command"] == whole["command"]
        assert {candidate.status for candidate in record.candidates} <= {"ok", "slow"}
    assert run(*TINY, *files) == 0
    assert "0 workloads measured, 2 known before" in capsys.readouterr().out
    # Another look at the same machine finds another rate; what is added goes to the same fingerprint.
    looked = dataclasses.replace(HARDWARE, memory_rate=HARDWARE.memory_rate * 1.2)
    again = dataclasses.replace(machine(), hardware=looked)
    monkeypatch.setattr(Machine, "here", classmethod(lambda cls, device, group=None: again))
    assert run(*TINY, "--tokens", "8..32", *files) == 0
    assert "1 workloads measured, 2 known before" in capsys.readouterr().out
    assert {each.record.hardware.memory_rate for each in Database.of_folders(tmp_path / "db").records()} == {10.0}


def test_inference_in_two_dtypes(tmp_path):
    code = run(*TINY, "--inference", "--dtype", "bfloat16", "--dtype", "float64", "--experts", "ffn", "--bias",
               "--threads", torch.get_num_threads(), "--exhaustive", "--db", tmp_path)  # fmt: skip
    assert code == 0
    keys = [each.record.key for each in Database.of_folders(tmp_path).records()]
    assert {(key.dtype, key.training, key.expert_numbers) for key in keys} == {
        (dtype, False, 2 * 8 * 16 + 16 + 8) for dtype in ("bfloat16", "float64")
    }


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_layers_of_a_file(tmp_path, suffix):
    layer = {"model_dim": 8, "hidden_dim": 16, "num_experts": 2}
    path = tmp_path / f"layers{suffix}"
    path.write_text(json.dumps([layer, {**layer, "experts": "ffn"}]))  # which is YAML too
    assert run("--layers", path, *TINY[6:], "--db", tmp_path / "db") == 0
    assert len(Database.of_folders(tmp_path / "db").records()) == 4


def test_layers_of_a_checkpoint(tmp_path):
    path = tmp_path / "model.pt"
    torch.save(torch.nn.Sequential(tutelx.MoE(8, 16, 2)).state_dict(), path)
    assert run("--from-model", path, "--dtype", "float64", *TINY[6:], "--db", tmp_path / "db") == 0
    keys = {each.record.key for each in Database.of_folders(tmp_path / "db").records()}
    assert {(key.num_experts, key.dtype) for key in keys} == {(2, "float64")}


def test_layers_of_a_transformers_config(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_local_experts": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 32}
    transformers.MixtralConfig(**sizes, **heads, architectures=["MixtralForCausalLM"]).save_pretrained(tmp_path)
    assert run("--from-model", tmp_path, "--tokens", "8", *TINY[8:], "--db", tmp_path / "db") == 0
    [stored] = Database.of_folders(tmp_path / "db").records()
    assert (stored.record.key.model_dim, stored.record.key.hidden_dim, stored.record.key.num_experts) == (16, 24, 4)


def test_ctrl_c_keeps_what_was_measured_and_the_next_run_goes_on(tmp_path, monkeypatch, capsys):
    plans, asked = Search.plans, []

    def interrupted(self, workload, together):
        asked.append(workload)
        if len(asked) == 2:
            signal.raise_signal(signal.SIGINT)
        return plans(self, workload, together)

    monkeypatch.setattr(Search, "plans", interrupted)
    assert run(*TINY, "--db", tmp_path) == 130
    assert "interrupted, 1 left: run it again to go on" in capsys.readouterr().out
    assert len(Database.of_folders(tmp_path).records()) == 1
    monkeypatch.setattr(Search, "plans", plans)
    assert run(*TINY, "--db", tmp_path) == 0
    assert "1 workloads measured, 1 known before" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no layer was given: --model-dim, --hidden-dim and --num-experts, or --layers, or --from-model"),
        (["--model-dim", "8"], "--hidden-dim, --num-experts is missing beside --model-dim"),
        ([*LAYER, "--layers", "x.yaml"], "--model-dim and --layers were given, expected one of them"),
        (["--layers", "/nowhere/x.yaml"], "'/nowhere/x.yaml' cannot be read: No such file"),
        (["--from-model", "/nowhere", "--device", "cpu"], "'/nowhere' does not exist"),
        ([*LAYER[:-1], "0"], "num_experts=0 is outside"),
        ([*TINY, "--top-k", "5"], "top_k=5 exceeds num_experts=4"),
        ([*TINY, "--tokens", "a"], "--tokens 'a' is neither a whole number nor a range"),
        ([*TINY, "--capacity", "0.5"], "load_factors=0.5 is outside 1..65536"),
        ([*TINY, "--margin", "0.5"], "margin=0.5 must be finite and at least 1"),
        ([*TINY, "--seconds", "0"], "seconds=0.0 must be finite and positive"),
        ([*TINY, "--budget", "nan"], "budget=nan must be finite and positive"),
        ([*TINY, "--seed", "-1"], "seed=-1 is outside"),
        ([*TINY, "--ranks", "0"], "ranks=0 is outside 1..1024"),
        (
            [*LAYER, "--ranks", "2", "--device", "cuda"],
            "--ranks 2 starts ranks on the CPU; on GPUs, start it by torchrun",
        ),
        ([*TINY, "--json", "/nowhere/a.json"], "'/nowhere/a.json' is a folder or lies in none"),
        ([*TINY, "--db", __file__], "is no folder"),
    ],
)
def test_wrong_use_is_one_line_before_anything_is_measured(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(Search, "plans", None)
    assert run(*arguments) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("tutelx tune: ")
    assert message in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"), [("[1", "is no YAML"), ("\xff", "it is no text"), ("- 1", "layer 0 is int")]
)
def test_files_that_hold_no_layers(tmp_path, capsys, text, message):
    path = tmp_path / "layers.yaml"
    path.write_bytes(text.encode("latin-1"))
    assert run("--layers", path) == 2
    assert message in capsys.readouterr().err


def test_a_launcher_that_contradicts(monkeypatch, capsys):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "4"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    assert run(*TINY, "--ranks", "2") == 2
    assert "--ranks 2 was given, but a launcher has started 4 ranks" in capsys.readouterr().err


def test_the_command_imports_nothing_heavy_to_check_its_flags():
    code = (
        "import sys; from tutelx.cli import main; main(['tune', '--model-dim', '8']);"
        " print({'torch', 'matplotlib', 'rich', 'yaml'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "set()\n", done.stderr


def test_ranks_are_started_as_torchrun_starts_them(monkeypatch, tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, sys; names = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE', 'MASTER_ADDR')\n"
        f"open({str(tmp_path)!r} + '/' + os.environ['RANK'], 'w').write(' '.join(os.environ[n] for n in names))\n"
        "sys.exit(3 if os.environ['RANK'] == '1' and 'fail' in sys.argv else 0)\n"
    )
    popen = subprocess.Popen
    monkeypatch.setattr(
        _tune_ranks.subprocess, "Popen", lambda command, env: popen([sys.executable, script, *command[3:]], env=env)
    )
    assert _tune_ranks.launch(2, ["tune"]) == 0
    assert [(tmp_path / str(rank)).read_text() for rank in (0, 1)] == ["0 2 0 2 127.0.0.1", "1 2 1 2 127.0.0.1"]
    assert _tune_ranks.launch(2, ["tune", "fail"]) == 3


@pytest.mark.slow
def test_two_ranks_from_the_command_line(tmp_path):
    command = [sys.executable, "-m", "tutelx", "tune", *TINY, "--ranks", "2", "--db", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 workloads measured") == 1
    keys = [each.record.key for each in Database.of_folders(tmp_path).records()]
    assert {(key.world, key.ranks_per_node) for key in keys} == {(2, 2)}
