"""The load of a case is just what was asked for."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tutelx.errors import InvalidValueError
from tutelx.tuner.cases import Subject, loaded_ids, same_terms
from tutelx.tuner.grid import Grid, World, fullest, numbers, ranges, workload, workload_of
from tutelx.tuner.shapes import Shape
from tutelx.tuning.key import Key

SHAPE = Shape(model_dim=8, hidden_dim=16, num_experts=4)


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 12), st.floats(0, 1))
def test_ids_have_the_load_and_no_expert_twice_a_token(tokens, num_experts, top_k, share):
    top_k = min(top_k, num_experts)
    least = -(-tokens * top_k // num_experts)
    most = least + round(share * (tokens - least))
    ids = loaded_ids(tokens, top_k, num_experts, most, torch.Generator().manual_seed(0))
    assert ids.shape == (tokens, top_k)
    assert ids.dtype == torch.int32
    assert all(len(set(row)) == top_k for row in ids.tolist())
    counts = torch.bincount(ids.flatten(), minlength=num_experts)
    assert len(counts) == num_experts
    wanted = tokens if top_k == num_experts else most
    assert counts[0] == wanted == counts.max()
    if num_experts > 1:
        assert counts[1:].max() - counts[1:].min() <= 1


def test_loads_by_hand():
    # 10 tokens, 2 of 4 experts: 5 each is balanced, twice that are all 10, and more a token cannot give.
    demands = [workload(SHAPE, World(), 10, 2, factor, training=True).demand for factor in (1, 1.1, 2, 4)]
    assert demands == [5, 6, 10, 10]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [SHAPE, Shape(model_dim=8, hidden_dim=24, num_experts=3, experts="ffn", bias=True)])
def test_a_layer_hears_the_workload_that_was_asked_for(shape, training):
    told = workload(shape, World(threads=torch.get_num_threads()), 12, 2, 1.5, training=training)
    subject = Subject(shape=shape, group=None, ranks_per_node=None, device=torch.device("cpu"), seed=0)
    heard, _ = subject.case(told).hear()
    assert same_terms(told, heard)
    assert Shape.of(heard) == shape


def test_one_workload_a_key_and_back():
    grid = Grid(tokens=(4, 64), top_k=(1, 2), load_factors=(1.0, 2.0, 4.0))
    works = grid.workloads([SHAPE], World(threads=2))
    keys = [Key.of(work) for work in works]
    # K = 1: loads of 1, 2, 4. K = 2: at most T of K*T/E = T/2, so 4 is 2.
    assert [(key.tokens, key.top_k, key.load_factor) for key in keys] == [
        (t, k, f) for t in (4, 64) for k, factors in ((1, (1, 2, 4)), (2, (1, 2))) for f in factors
    ]
    assert [workload_of(key) for key in keys] == works
    assert [fullest(work) for work in works] == [work.demand for work in works]


def test_what_a_device_does_not_tell_is_one_key():
    [work] = Grid(tokens=(64,), top_k=(1,)).workloads([SHAPE], World(device="cuda"))
    assert (work.demand, Key.of(work).load_factor, fullest(work)) == (None, 0.0, 32)


def test_over_ranks_a_layer_can_gather_and_send():
    work = workload(SHAPE, World(world=8, ranks_per_node=4), 16, 1, 1.0, training=True)
    assert (work.shard_degrees, work.all_to_alls) == ((0, 1, 2), ("linear", "2dh"))
    assert "grouped" not in work.expert_kernels


def test_ranges_by_hand():
    assert ranges("64..512", "tokens") == (64, 128, 256, 512)
    assert ranges("1,64..200, 7", "tokens") == (1, 64, 128, 200, 7)
    assert numbers("1,2.5", "capacity") == (1.0, 2.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "--tokens '' is neither a whole number nor a range"),
        ("8..", "--tokens '8..' is neither"),
        ("-1", "--tokens '-1' is neither"),
        ("9..8", "--tokens '9..8' must go up from at least 1"),
        ("0", "--tokens '0' must go up"),
        ("9" * 5000, "is neither a whole number"),
    ],
)
def test_ranges_that_are_none(text, message):
    with pytest.raises(InvalidValueError) as raised:
        ranges(text, "tokens")
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": ()}, "tokens is empty"),
        ({"tokens": (2**25,)}, "tokens=33554432 is outside 1..16777216"),
        ({"load_factors": (0.5,)}, "load_factors=0.5 is outside 1..65536"),
        ({"load_factors": (float("nan"),)}, "load_factors=nan is outside"),
        ({"top_k": (9,)}, "top_k=9 exceeds num_experts=4"),
    ],
)
def test_grids_that_are_none(change, message):
    with pytest.raises(InvalidValueError, match=message):
        Grid(**{"tokens": (8,), **change}).workloads([SHAPE], World())
