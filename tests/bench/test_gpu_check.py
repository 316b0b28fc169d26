"""make gpu-check without a GPU: what it says, what it skips, how it ends."""

import sys

import pytest
import torch

from benchmarks import gpu_bench, gpu_check
from benchmarks.gpu_check import Card, Options, Outcome
from tutelx.bench import record
from tutelx.bench.shapes import Shape
from tutelx.errors import InvalidValueError

CARD = Card(name="NVIDIA Test 9000", capability="9.0", torch="2")


@pytest.fixture
def options(tmp_path):
    return Options(results=tmp_path / "results", minutes=1.0, ops=())


@pytest.fixture
def built(monkeypatch):
    monkeypatch.setattr(gpu_check, "lacks_kernels", lambda: None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_why(capsys):
    assert gpu_check.main([]) == gpu_check.CANNOT
    assert "gpu-check cannot run here: torch" in capsys.readouterr().err


def test_what_is_missing_is_named(monkeypatch, options, built):
    assert gpu_check.absent("json", "no_such_module", "nor_this") == "no_such_module, nor_this"
    monkeypatch.setattr(gpu_check, "absent", lambda *modules: ", ".join(modules))
    with pytest.raises(gpu_check.CannotRun, match="lacks torch, numpy"):
        gpu_check.find_card()
    for stage in (gpu_check.build, gpu_check.tests):
        outcome = stage(CARD, options)
        assert outcome.status == "failed"
        assert outcome.detail.startswith(f"{sys.executable} lacks ")


def test_unknown_stages_are_refused(capsys):
    with pytest.raises(SystemExit):
        gpu_check.main(["build", "ship"])
    assert "stage 'ship' is none of build, tests, sanitizer, bench" in capsys.readouterr().err


def outcomes(**statuses):
    return {
        name: lambda card, options, s=status: Outcome(status=s, detail=f"was {s}") for name, status in statuses.items()
    }


@pytest.mark.parametrize(
    ("statuses", "code"),
    [
        ({"build": "passed", "tests": "passed", "sanitizer": "skipped", "bench": "passed"}, 0),
        ({"build": "passed", "tests": "failed", "sanitizer": "passed", "bench": "passed"}, 1),
    ],
)
def test_the_exit_code(statuses, code, monkeypatch, options, capsys):
    monkeypatch.setattr(gpu_check, "STAGES", outcomes(**statuses))
    assert gpu_check.run(list(statuses), CARD, options) == code
    summary = capsys.readouterr().out.split("gpu-check on ")[1]
    assert summary.startswith("NVIDIA Test 9000 (sm_90), torch 2")
    assert all(f"was {status}" in summary for status in statuses.values())


def test_a_failed_build_ends_it_and_stages_keep_their_order(monkeypatch, options, capsys):
    monkeypatch.setattr(gpu_check, "STAGES", outcomes(build="failed", tests="passed", bench="passed"))
    assert gpu_check.run(["bench", "build"], CARD, options) == 1
    summary = capsys.readouterr().out.split("gpu-check on ")[1]
    assert "not run: bench" in summary
    assert "tests" not in summary


def test_the_build_is_for_the_card_and_says_what_it_left_out(monkeypatch, options, built, tmp_path):
    seen = {}

    def call(command, minutes, **environment):
        seen.update(environment)
        return 0, ""

    monkeypatch.setattr(gpu_check, "call", call)
    monkeypatch.setattr(gpu_check.sysconfig, "get_path", lambda name: str(tmp_path))
    outcome = gpu_check.build(CARD, options)
    assert outcome.status == "passed"
    assert outcome.detail.startswith("for compute capability 9.0, without what needs Python.h, which is missing")
    assert (seen["TUTELX_CUDA"], seen["TORCH_CUDA_ARCH_LIST"], seen["TUTELX_PYTHON_API"]) == ("1", "9.0", "0")
    (tmp_path / "Python.h").touch()
    seen.clear()
    assert "Python.h" not in gpu_check.build(CARD, options).detail
    assert "TUTELX_PYTHON_API" not in seen


def test_a_stage_before_the_build(options, monkeypatch):
    monkeypatch.setattr(gpu_check, "lacks_kernels", lambda: "the extension has no CUDA kernels; run the stage build")
    for stage in (gpu_check.tests, gpu_check.sanitizer, gpu_check.bench):
        assert "run the stage build" in stage(CARD, options).detail


@pytest.mark.skipif(torch.version.cuda is not None, reason="the extension may have CUDA kernels")
def test_an_extension_for_the_cpu_is_recognised():
    assert gpu_check.lacks_kernels() == "the extension has no CUDA kernels; run the stage build"


SANITIZERS = {
    "exit 3": ("skipped", "compute-sanitizer does not work here: no output"),
    "echo every kernel was launched": ("passed", "memcheck, racecheck, synccheck: no error"),
    'case "$*" in *racecheck*) exit 86;; esac; echo every kernel was launched': (
        "failed",
        "racecheck ended with exit code 86",
    ),
    "true": ("failed", "memcheck ended with exit code 0"),  # it ran, and launched nothing
}


@pytest.mark.parametrize("script", SANITIZERS)
def test_the_sanitizer(script, options, built, monkeypatch, tmp_path):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    outcome = gpu_check.sanitizer(CARD, options)
    assert (outcome.status, outcome.detail) == SANITIZERS[script]


def test_no_sanitizer_is_no_failure(options, built, monkeypatch):
    monkeypatch.setattr(gpu_check, "find_sanitizer", lambda: None)
    assert gpu_check.sanitizer(CARD, options) == Outcome(status="skipped", detail="compute-sanitizer is not installed")


def test_commands_end_in_time():
    endless = "import subprocess, sys; print(1, flush=True); subprocess.run([sys.executable, '-c', 'while 1: pass'])"
    code, output = gpu_check.call([sys.executable, "-c", endless], 1 / 60)
    assert (code, output) == (None, "1\n")
    assert gpu_check.failed("it", None, output).detail == "it ran out of time"


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(gpu_bench, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_bench, "SECONDS", 0.001)
    one = (Shape(T=2, D=4, E=4, H=4),)
    monkeypatch.setattr(gpu_bench, "SHAPES", {"encode": (*one, Shape(T=3, D=4, E=4, H=4)), "gate": one})


def test_benchmarks_are_kept_and_replaced(on_cpu, tmp_path):
    first = gpu_bench.run(tmp_path, ("encode",), deadline=float("inf"))
    assert first["status"] == "passed"
    assert "of 2 at 80% of a copy or more" in first["detail"]
    (path,) = tmp_path.iterdir()
    assert len(record.read(path)["rows"]) == 2
    assert not record.read(path)["complete"]
    gpu_bench.run(tmp_path, ("gate",), deadline=float("inf"))
    gpu_bench.run(tmp_path, ("encode",), deadline=float("inf"))
    found = record.read(path)
    assert [row["op"] for row in found["rows"]] == ["gate", "encode", "encode"]
    assert found["complete"]


def test_out_of_time_leaves_what_there_is(on_cpu, tmp_path):
    outcome = gpu_bench.run(tmp_path, (), deadline=0.0)
    assert outcome["status"] == "failed"
    assert outcome["detail"].startswith("1 of 3 rows in ")
    assert "out of time" in outcome["detail"]
    (path,) = tmp_path.iterdir()
    assert not record.read(path)["complete"]


def test_unknown_benchmarks_are_refused(on_cpu, tmp_path):
    with pytest.raises(InvalidValueError, match="op 'sort' is none of encode, gate"):
        gpu_bench.run(tmp_path, ("sort",), deadline=0.0)


def test_the_shapes_of_the_target():
    shapes = [shape for shape in gpu_bench.SHAPES["decode"] if shape.T > 1]
    assert len(shapes) == 3 * 2 * 3
    assert {shape.E for shape in shapes} == {64}
    assert gpu_bench.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
