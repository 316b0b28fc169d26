"""How many copies, of what, and that they are copies."""

from types import SimpleNamespace

import pytest
import torch

from tutelx.bench import machine, rotation
from tutelx.bench.shapes import Shape
from tutelx.bench.subjects import SUBJECTS

MB = 2**20


def test_the_working_set_exceeds_four_caches():
    found = rotation.plan(3 * MB, cache=10 * MB, memory=1000 * MB)
    assert (found.copies, found.bytes, found.wanted, found.limited_by) == (14, 42 * MB, 40 * MB, None)


def test_one_set_larger_than_that_is_enough():
    assert rotation.plan(41 * MB, cache=10 * MB, memory=1000 * MB).copies == 1


def test_memory_limits_it_and_says_so():
    found = rotation.plan(3 * MB, cache=10 * MB, memory=40 * MB)
    assert (found.copies, found.limited_by) == (3, "memory")
    assert rotation.plan(30 * MB, cache=10 * MB, memory=4 * MB).copies == 1


def test_tiny_inputs_are_limited_by_copies():
    found = rotation.plan(1000, cache=10 * MB, memory=1000 * MB)
    assert (found.copies, found.limited_by) == (rotation.MOST_COPIES, "copies")


def test_the_size_counts_every_tensor():
    value = {"a": torch.zeros(3), "b": [torch.zeros(2, dtype=torch.float64), SimpleNamespace(c=torch.zeros(5))], "d": 7}
    assert rotation.size_of(value) == 12 + 16 + 20
    assert rotation.size_of(torch.nn.Linear(3, 2, bias=False)) == 24


def test_copies_are_equal_and_apart():
    inputs = SUBJECTS["decode"].make(Shape(T=5, D=3, E=4, H=2), torch.float32)
    first, second = rotation.rotate(inputs, 2)
    assert torch.equal(first.rows_RD, second.rows_RD)
    assert first.rows_RD.data_ptr() != second.rows_RD.data_ptr()
    assert first.map.dest.data_ptr() != second.map.dest.data_ptr()


def test_the_copy_reads_half_of_what_must_move_and_writes_the_other_half():
    pairs = rotation.copy_pairs(1000, torch.device("cpu"), cache=1000, memory=10**9)
    assert {tensor.numel() * tensor.element_size() for pair in pairs for tensor in pair} == {500}
    assert len(pairs) == 4
    assert rotation.copy_once(pairs[0]) is pairs[0][1]


def test_experts_take_turns_before_their_weights_are_copied():
    subject = SUBJECTS["expert_ffn"]
    inputs = subject.make(Shape(T=1, D=4, K=2, E=6, H=3), torch.float32)
    sets = subject.rotate(inputs, 4)
    experts = [{e for e, _, _ in each.used} for each in sets]
    assert experts == [{0, 1}, {2, 3}, {4, 5}, {0, 1}]
    weights = [each.weights.up[0].data_ptr() for each in sets]
    assert weights[0] == weights[1] == weights[2] != weights[3]


def test_caches_are_read(tmp_path):
    for index, (level, kind, size) in enumerate(
        [(1, "Data", "48K"), (1, "Instruction", "32K"), (3, "Unified", "105M")]
    ):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        for name, value in (("level", level), ("type", kind), ("size", size)):
            (folder / name).write_text(f"{value}\n")
    (tmp_path / "index9").mkdir()
    assert machine.caches(tmp_path) == {"L1d": 48 * 2**10, "L3": 105 * MB}


def test_without_caches_there_is_a_fallback(monkeypatch):
    monkeypatch.setattr(machine, "caches", dict)
    assert machine.last_level_cache(torch.device("cpu")) == machine.FALLBACK_CACHE


@pytest.mark.parametrize("op", list(SUBJECTS))
def test_moving_to_a_device_keeps_types_and_leaves(op):
    inputs = SUBJECTS[op].make(Shape(T=3, D=8, E=4, H=2), torch.float32)
    moved = rotation._moved(inputs, torch.device("cpu"))
    assert type(moved) is type(inputs)
    for one, other in zip(rotation.tensors(inputs), rotation.tensors(moved), strict=True):
        assert torch.equal(one, other)
        assert (one.requires_grad, one.is_leaf) == (other.requires_grad, other.is_leaf)
