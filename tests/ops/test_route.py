"""route against the queue of each expert, written out as a loop."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.cases import ODD_CASES, expert_ids
from tests.ops.checks import as_lists, check_route
from tutelx import ops
from tutelx.ops import reference


def test_worked_by_hand():
    # Slots in order: first choices of tokens 0, 1, 2 -> experts 1, 0, 1; then second choices -> 0, 2, unused.
    ids = torch.tensor([[1, 0], [0, 2], [1, -1]])
    map = ops.route(ids, 3)
    # Expert 0 gets token 1's first and token 0's second choice: rows 0, 1. Expert 1 gets tokens 0 and 2: rows 2, 3.
    assert map.dest.tolist() == [[2, 1], [0, 4], [3, -1]]
    assert map.source.tolist() == [2, 1, 0, 4, 3, -1]
    assert map.counts.tolist() == [2, 2, 1]
    assert map.offsets.tolist() == [0, 2, 4, 5]
    padded = ops.route(ids, 3, capacity=1)
    assert padded.dest.tolist() == [[1, -1], [0, 2], [-1, -1]]
    assert padded.source.tolist() == [2, 0, 3]
    assert padded.counts.tolist() == [2, 2, 1], "counts are those before any drop"


@pytest.mark.parametrize("case", ODD_CASES, ids=str)
@pytest.mark.parametrize("layout", ["ragged", "padded"])
@pytest.mark.parametrize("capacity", [None, 1, 3, 1000])
def test_matches_the_loop(case, layout, capacity):
    check_route(case, capacity, layout)


def test_many_blocks_and_threads():
    # Enough slots for several blocks, so that the scan over blocks matters.
    ids = torch.randint(-1, 9, (20_000, 2), dtype=torch.int32)
    for capacity, layout in ((None, "ragged"), (3000, "padded"), (3000, "ragged")):
        map = ops.route(ids, 9, capacity, layout=layout)
        assert as_lists(map) == reference.route(ids, 9, capacity, layout=layout)


@given(data=st.data(), tokens=st.integers(0, 20), top_k=st.integers(1, 4), experts=st.integers(1, 6))
def test_every_slot_has_its_own_row(data, tokens, top_k, experts):
    flat = data.draw(st.lists(st.integers(-1, experts - 1), min_size=tokens * top_k, max_size=tokens * top_k))
    capacity = data.draw(st.none() | st.integers(1, 8))
    layout = data.draw(st.sampled_from(["ragged", "padded"]))
    ids = torch.tensor(flat, dtype=torch.int32).reshape(tokens, top_k)
    map = ops.route(ids, experts, capacity, layout=layout)
    rows = map.dest[map.dest >= 0]
    assert rows.unique().numel() == rows.numel()
    for row in rows.tolist():
        slot = int(map.source[row])
        assert int(map.dest.reshape(-1)[slot]) == row
        expert = int(ids.reshape(-1)[slot])
        assert int(map.offsets[expert]) <= row < int(map.offsets[expert + 1])
    assert int((map.source >= 0).sum()) == rows.numel()


@given(order=st.permutations(range(9)))
def test_priority_order(order):
    ids = torch.randint(0, 3, (9, 2), dtype=torch.int32, generator=torch.Generator().manual_seed(1))
    map = ops.route(ids, 3, 2, order=torch.tensor(order))
    assert as_lists(map) == reference.route(ids, 3, 2, layout="padded", order=torch.tensor(order))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.tensor([[8]]), 8), r"expert_ids\[0,0\]=8 is outside \[-1, num_experts=8\)"),
        ((torch.tensor([[-2]]), 8), r"expert_ids\[0,0\]=-2"),
        ((torch.tensor([[2**32 + 1]]), 8), r"outside \[-1, num_experts=8\)"),
        ((torch.tensor([[0]]), 0), "num_experts=0 must be at least 1"),
        ((torch.tensor([[0]]), 1, 0), "capacity=0 must be at least 1"),
        ((torch.tensor([[0]]), 1, -3), "capacity=-3 must be at least 1"),
        ((torch.tensor([0]), 1), "expert_ids has 1 dimensions"),
    ],
)
def test_bad_values(arguments, message):
    with pytest.raises(ValueError, match=message):
        ops.route(*arguments)


def test_bad_types_and_order():
    ids = torch.zeros((3, 1), dtype=torch.int32)
    with pytest.raises(TypeError, match=r"expert_ids is torch.float32"):
        ops.route(ids.float(), 1)
    with pytest.raises(TypeError, match="capacity='2' is str"):
        ops.route(ids, 1, "2")
    with pytest.raises(ValueError, match="token 1 appears twice"):
        ops.route(ids, 1, order=torch.tensor([0, 1, 1]))
    with pytest.raises(ValueError, match=r"order\[2\]=3 is outside \[0, T=3\)"):
        ops.route(ids, 1, order=torch.tensor([0, 1, 3]))
    with pytest.raises(ValueError, match="layout='flat'"):
        ops.route(ids, 1, layout="flat")


def test_strided_ids():
    ids = expert_ids(ODD_CASES[3])
    wide = torch.stack([ids, ids], dim=2)[:, :, 0]
    assert not wide.is_contiguous()
    assert as_lists(ops.route(wide, 11)) == as_lists(ops.route(ids, 11))
