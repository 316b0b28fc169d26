"""Placement by hand, against torch.chunk, and as a partition of experts and hidden units."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tutelx.comm.placement import Placement, chunk

SIZES = {"num_experts": st.integers(1, 12), "hidden_dim": st.integers(1, 20), "world": st.integers(1, 12)}


def test_by_hand():
    # 6 experts on 4 ranks: ceil(6/4) = 2 each, the last rank none.
    whole = Placement(num_experts=6, hidden_dim=8, world=4)
    assert [list(whole.experts_of(w)) for w in range(4)] == [[0, 1], [2, 3], [4, 5], []]
    assert (whole.slices, whole.degrees(), whole.slice_of(1)) == (1, (0, 1), range(8))
    assert list(whole.ranks_of(5)) == [2]
    assert list(whole.targets(5, 3, 1)) == [2]
    # 2 experts on 8 ranks: s = 4; rank 6 owns slice 2 of expert 1. 10 hidden units cut as 3, 3, 3, 1.
    cut = Placement(num_experts=2, hidden_dim=10, world=8)
    assert (cut.slices, cut.degrees()) == (4, (0, 1, 2, 4))
    assert (cut.experts_of(6), cut.slice_of(6)) == (range(1, 2), range(6, 9))
    assert list(cut.ranks_of(1)) == [4, 5, 6, 7]
    # r = 2: groups {4,5} and {6,7} gather; rank 3 sends to the second member of each.
    assert (cut.gathered_by(6, 2), list(cut.targets(1, 3, 2))) == (range(6, 8), [5, 7])
    assert (cut.gathered_by(6, 1), list(cut.targets(1, 3, 1))) == (range(4, 8), [7])
    assert (cut.gathered_by(6, 4), list(cut.targets(1, 3, 4))) == (range(6, 7), [4, 5, 6, 7])


def test_experts_that_cannot_be_cut():
    placed = Placement(num_experts=2, hidden_dim=None, world=4)
    assert (placed.slices, [len(placed.experts_of(w)) for w in range(4)]) == (1, [1, 1, 0, 0])


def test_fewer_experts_than_ranks_without_division():
    placed = Placement(num_experts=2, hidden_dim=8, world=3)
    assert (placed.slices, [len(placed.experts_of(w)) for w in range(3)]) == (1, [1, 1, 0])


@given(total=st.integers(1, 30), parts=st.integers(1, 30))
def test_deals_as_torch_chunk(total, parts):
    expected = [c.tolist() for c in torch.arange(total).chunk(parts)]
    dealt = [list(chunk(total, parts, i)) for i in range(parts)]
    assert dealt == expected + [[]] * (parts - len(expected))


@given(**SIZES)
def test_every_hidden_unit_of_every_expert_is_owned_once(num_experts, hidden_dim, world):
    placed = Placement(num_experts=num_experts, hidden_dim=hidden_dim, world=world)
    owned = [(e, h) for w in range(world) for e in placed.experts_of(w) for h in placed.slice_of(w)]
    assert sorted(owned) == [(e, h) for e in range(num_experts) for h in range(hidden_dim)]
    for expert in range(num_experts):
        assert [w for w in range(world) if expert in placed.experts_of(w)] == list(placed.ranks_of(expert))


@given(**SIZES)
def test_targets_hold_the_whole_expert_between_them(num_experts, hidden_dim, world):
    placed = Placement(num_experts=num_experts, hidden_dim=hidden_dim, world=world)
    for degree in placed.degrees()[1:]:
        for expert in range(num_experts):
            for source in range(world):
                targets = list(placed.targets(expert, source, degree))
                held = [h for t in targets for w in placed.gathered_by(t, degree) for h in placed.slice_of(w)]
                assert len(targets) == degree
                assert held == list(range(hidden_dim)), "in order, so that a gathered weight is one contiguous part"


def test_refuses():
    placed = Placement(num_experts=2, hidden_dim=8, world=8)
    with pytest.raises(ValueError, match=r"shard_degree=3 is none of \(1, 2, 4\) \(s=4\)"):
        placed.gathered_by(0, 3)
    with pytest.raises(ValueError, match=r"shard_degree=0 is none of"):
        placed.targets(0, 0, 0)
    with pytest.raises(ValueError, match=r"rank=8 is outside \[0, world=8\)"):
        placed.experts_of(8)
    with pytest.raises(ValueError, match=r"expert=2 is outside"):
        placed.ranks_of(2)
    with pytest.raises(ValueError, match="num_experts=0 must be at least 1"):
        Placement(num_experts=0, hidden_dim=8, world=8)
