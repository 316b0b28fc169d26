"""The launcher: what it asks torchrun for, and the exit code that comes back."""

import os
import subprocess
import sys

import pytest

from tutelx.errors import InvalidValueError
from tutelx.integrations.tutel.launcher import execl, run

NAMES = ("TUTEL_CUDA_SANDBOX", "CUDA_VISIBLE_DEVICES")
CHILD = """
import os, sys
from tutelx.integrations.tutel import net, system
env = system.init_data_model_parallel(backend="gloo")
import torch
assert env.global_size == env.local_size == int(net.simple_all_reduce(torch.ones(1)))
env.dist_print("rank", env.global_rank, "of", env.global_size, *sys.argv[1:])
code = sys.argv[1]
net.barrier()
if env.global_rank == 1 and code.isdigit():
    sys.exit(int(code))
if code == "raise":
    raise KeyError("lost")
if code == "kill":
    os.kill(os.getpid(), 9)
"""


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    names = ("LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS", "LOCAL_RANK", *NAMES)
    for name in names:
        monkeypatch.setenv(name, "")  # so that what the launcher sets goes away with the test
        monkeypatch.delenv(name)


def test_arguments(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    program = ["-m", run.EXECL, "train.py", "--nproc=3"]
    assert run.torchrun_arguments(["train.py", "--nproc=3"]) == ["--nproc-per-node=1", "--standalone", *program]
    assert os.environ["OMP_NUM_THREADS"] == "16"
    monkeypatch.delenv("OMP_NUM_THREADS")
    for name, value in {"SIZE": "2", "RANK": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", value)
    monkeypatch.setenv("LOCAL_SIZE", "8")
    with pytest.raises(InvalidValueError, match="MASTER_ADDR is not set, and mpiexec started 2 hosts"):
        run.torchrun_arguments(["train.py"])
    monkeypatch.setenv("MASTER_ADDR", "first")
    hosts = ["--nproc-per-node=8", "--nnodes=2", "--node-rank=1", "--master-addr=first", "--master-port=23232"]
    assert run.torchrun_arguments(["train.py", "--nproc=3"]) == [*hosts, *program]
    assert os.environ["OMP_NUM_THREADS"] == "2"
    monkeypatch.setenv("LOCAL_SIZE", "eight")
    with pytest.raises(InvalidValueError, match="LOCAL_SIZE='eight' is no positive integer"):
        run.torchrun_arguments(["train.py"])


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("7", 7),
        pytest.param("0", 0, marks=pytest.mark.slow),
        pytest.param("raise", 1, marks=pytest.mark.slow),
        pytest.param("kill", 128 + 9, marks=pytest.mark.slow),
    ],
)
def test_exit_codes(tmp_path, code, expected):
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    command = [sys.executable, "-m", "tutelx.integrations.tutel.launcher.run", str(script), code, "--more"]
    variables = {**os.environ, "LOCAL_SIZE": "2", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert done.returncode == expected, done.stderr
    assert f"rank 0 of 2 {code} --more\n" in done.stdout


def test_no_program(capsys):
    for words in ([], ["-m"]):
        assert run.main(words) == 2
        with pytest.raises(SystemExit) as ended:
            execl.main(words)
        assert ended.value.code == 2
    assert capsys.readouterr().err.count("there is no program: give its path, or -m and its module") == 4


def test_commands():
    assert execl.command_of(["-m", "json.tool", "-m"]) == [sys.executable, "-m", "json.tool", "-m"]
    assert execl.command_of(["train.py", "x"]) == [sys.executable, "train.py", "x"]
    assert execl.command_of(["echo", "x.py"]) == ["echo", "x.py"]


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["sh", "-c", "exit 5"], 5, ""),
        (["no-such-program"], 127, "'no-such-program': No such file"),
        (["/"], 126, "'/': Permission denied"),
    ],
)
def test_a_program_takes_the_place(words, code, text):
    command = [sys.executable, "-m", "tutelx.integrations.tutel.launcher.execl", *words]
    done = subprocess.run(command, env={**os.environ, "NUMA_TYPE": "0"}, capture_output=True, text=True)
    assert done.returncode == code
    assert text in done.stderr


@pytest.mark.parametrize(
    ("before", "rank", "after"),
    [
        ({}, "1", ("1", None)),
        ({"TUTEL_CUDA_SANDBOX": "2"}, "1", ("2", "1")),
        ({"TUTEL_CUDA_SANDBOX": "2", "CUDA_VISIBLE_DEVICES": "4, 6"}, "1", ("2", "6")),
    ],
)
def test_what_a_rank_sees(monkeypatch, before, rank, after):
    for name, value in {**before, "LOCAL_RANK": rank, "NUMA_TYPE": "0"}.items():
        monkeypatch.setenv(name, value)
    found = []
    monkeypatch.setattr(os, "execvp", lambda *_: found.append(tuple(map(os.environ.get, NAMES))))
    execl.main(["true"])
    assert found == [after]


def test_a_gpu_that_is_not_listed(monkeypatch, capsys):
    for name, value in {"TUTEL_CUDA_SANDBOX": "2", "CUDA_VISIBLE_DEVICES": "4", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NUMA_TYPE", "0")
    with pytest.raises(SystemExit):
        execl.main(["true"])
    assert "LOCAL_RANK=1, but CUDA_VISIBLE_DEVICES='4' has 1" in capsys.readouterr().err
