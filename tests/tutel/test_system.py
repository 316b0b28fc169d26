"""Sessions, clocks, affinity and files of the Tutel face."""

import os

import numpy as np
import pytest
import torch

from tests.comm.test_failures import caught
from tutelx.integrations.tutel import system
from tutelx.integrations.tutel.system import affinity, session


@pytest.fixture
def by_itself(monkeypatch):
    """A process that no launcher started, without a session; and none remains."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(session, "_session", None)


def test_session_of_a_single_process(by_itself, capsys):
    assert "call system.init_data_model_parallel() first" in caught(system.get_local_session)
    assert system.record_time() > 0  # as good without a session
    env = system.init_data_model_parallel(backend="gloo")
    assert system.get_local_session() is env
    assert (env.global_size, env.global_rank, env.local_device) == (1, 0, torch.device("cpu"))
    assert (env.data_rank, env.model_rank, env.is_cuda, env.is_distributed) == (0, 0, False, False)
    env.dist_print("one", "two")
    assert capsys.readouterr().out == "one two\n"
    assert "group_count=2 does not divide 1 ranks" in caught(system.init_data_model_parallel, 2, "gloo")
    if not torch.cuda.is_available():
        assert "backend='nccl' needs a GPU" in caught(system.init_data_model_parallel)


def test_session_over_ranks(ranks):
    assert ranks(2).run(over_ranks) == [(2, 0, 1, "0 of 2\n"), (2, 1, 0, "")]


def over_ranks(group):
    import contextlib
    import io

    env = system.init_data_model_parallel(group_count=2, backend="gloo")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        env.dist_print(f"{env.global_rank} of {env.global_size}")
    return env.group_count, env.data_rank, 1 - env.data_rank, out.getvalue()


def test_clock(by_itself, capsys):
    first = system.record_time(is_cuda=False)
    assert system.record_time(is_cuda=False) >= first
    calls = []
    assert system.perform(lambda: calls.append(1), num_runs=3) >= 1e-6
    assert len(calls) == 5 + 3
    assert capsys.readouterr().out.startswith("Function Latency = 0.0")
    assert "num_runs=0, expected at least 1" in caught(system.perform, len, 0)
    assert "num_runs=1.5 is float, expected int" in caught(system.perform, len, 1.5)


def test_cache():
    cache = system.cache()
    cache.reset()
    cache.set("one", 1)
    cache.set(None, 2)
    assert system.LocalCache.get("one") == 1
    assert cache.get() == 2
    cache.reset()
    cache.set("one", 1)
    cache.set("two", 2)
    assert cache.get() == [1, 2]
    assert "the cache has no 'three', only ['one', 'two']" in caught(cache.get, "three")
    cache.reset()
    assert cache.get() == []


def test_arrays(tmp_path):
    x = torch.tensor([[1.5, float("nan")]], requires_grad=True)
    system.save(x, tmp_path / "x.npy")
    system.save(x, tmp_path / "y")  # numpy adds .npy
    for name in ("x.npy", "y", "y.npy"):
        torch.testing.assert_close(system.load(tmp_path / name), x.detach(), equal_nan=True)
    assert system.load(tmp_path / "y", device="meta").device.type == "meta"
    assert "numpy has no bfloat16" in caught(system.save, x.bfloat16(), tmp_path / "z")
    assert "t is int, expected torch.Tensor" in caught(system.save, 3, tmp_path / "z")
    assert "cannot be read as an array" in caught(system.load, tmp_path / "z")
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object))
    assert "InvalidValueError" in caught(system.load, tmp_path / "objects.npy")
    (tmp_path / "text").write_text("text")
    assert "InvalidValueError" in caught(system.load, tmp_path / "text")


def test_fetched_arrays(tmp_path, capfd):
    link, kept = (tmp_path / "array.npy").as_uri(), tmp_path / "new folder" / "kept"
    np.save(tmp_path / "array.npy", np.arange(3))
    assert system.from_url(link).tolist() == [0, 1, 2]
    assert system.from_url(link, kept).tolist() == [0, 1, 2]
    (tmp_path / "array.npy").write_bytes(b"damaged on the way")
    assert system.from_url(link, kept).tolist() == [0, 1, 2], "it was there"
    assert "cannot be read" in caught(system.from_url, link, tmp_path / "other")
    assert "cannot be read" in caught(system.from_url, (tmp_path / "missing").as_uri())
    assert "there is nothing to load" in caught(system.from_url, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["array.npy", "new folder"]


def test_patterns(tmp_path, caplog):
    pattern = f"{tmp_path}/a/{{rank}}-of-{{size}}.ckpt"
    assert system.apply_rank_size_from_pattern(pattern, rank=3, size=8, create_dir=False) == f"{tmp_path}/a/3-of-8.ckpt"
    assert not (tmp_path / "a").exists()
    system.apply_rank_size_from_pattern(pattern, 3, 8)
    system.apply_rank_size_from_pattern(pattern, 3, 8)
    assert (tmp_path / "a").is_dir()
    assert system.apply_rank_size_from_pattern("{size}", 0, 1) == "1"
    assert not caplog.records
    assert system.apply_rank_size_from_pattern("all", 0, 2) == "all"
    assert "'all' has no {rank}: all 2 ranks share this file" in caplog.text


@pytest.fixture
def bound(monkeypatch, tmp_path):
    """A machine of three nodes, of which one has memory only; what the process was bound to."""
    for node, cpus in {0: [0, 1], 1: [], 10: [2, 3, 4]}.items():
        (tmp_path / f"node{node}").mkdir()
        for cpu in cpus:
            (tmp_path / f"node{node}" / f"cpu{cpu}").mkdir()
        (tmp_path / f"node{node}" / "cpulist").touch()
    (tmp_path / "possible").touch()
    calls = []
    monkeypatch.setattr(affinity, "NODES", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cpus: calls.append(cpus))
    for name in ("TUTEL_CUDA_SANDBOX", "NUMA_TYPE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    return calls


@pytest.mark.parametrize(
    ("variables", "cpus"),
    [
        ({}, [{0, 1}]),
        ({"LOCAL_RANK": "1"}, [{2, 3}]),  # CPU 4 is not this process's
        ({"LOCAL_RANK": "2"}, [{0, 1}]),
        ({"LOCAL_RANK": "3", "NUMA_TYPE": "2"}, [{2, 3}]),
        ({"LOCAL_RANK": "1", "NUMA_TYPE": "0"}, []),
        ({"LOCAL_RANK": "1", "NUMA_TYPE": "-1"}, []),
        ({"LOCAL_RANK": "1", "TUTEL_CUDA_SANDBOX": "1"}, []),
    ],
)
def test_affinity(bound, monkeypatch, variables, cpus):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    system.init_affinity_at_program_beginning()
    assert bound == cpus
    assert int(variables.get("TUTEL_CUDA_SANDBOX", 0)) == system.TUTEL_CUDA_SANDBOX


def test_affinity_that_cannot_be_set(bound, monkeypatch, caplog, tmp_path):
    monkeypatch.setattr(affinity, "NODES", tmp_path / "missing")
    system.init_affinity_at_program_beginning()
    assert "the NUMA node could not be set: " in caplog.text
    monkeypatch.setenv("NUMA_TYPE", "two")
    assert "NUMA_TYPE='two' is no whole number" in caught(system.init_affinity_at_program_beginning)
