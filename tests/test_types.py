"""Capacity's arithmetic by hand, and what the configuration types refuse."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelx.types import Capacity, Plan, Workload


@pytest.mark.parametrize(
    ("factor", "tokens", "top_k", "experts", "rows"),
    [
        (1.0, 8, 2, 4, 4),  # 2*8/4
        (1.25, 8, 2, 4, 5),  # 1.25*4
        (1.0, 7, 1, 4, 2),  # 7/4 rounded up
        (1.1, 10, 1, 1, 11),  # 1.1*10 is 11.000000000000002 in binary
        (0.001, 8, 1, 4, 1),  # never below 1
        (2, 0, 2, 4, 1),
    ],
)
def test_capacity_rows(factor, tokens, top_k, experts, rows):
    for make in (Capacity.fixed, Capacity.bounded):
        assert make(factor).limit(tokens=tokens, top_k=top_k, num_experts=experts) == rows


def test_dropless_has_no_limit():
    assert Capacity.dropless().limit(tokens=8, top_k=2, num_experts=4) is None


@given(factor=st.floats(0.01, 100), tokens=st.integers(1, 10_000), experts=st.integers(1, 64))
def test_capacity_grants_the_share_and_less_than_one_more(factor, tokens, experts):
    rows = Capacity.fixed(factor).limit(tokens=tokens, top_k=1, num_experts=experts)
    exact = factor * tokens / experts
    assert rows >= exact * (1 - 1e-8)
    assert rows == 1 or rows < exact + 1


@pytest.mark.parametrize("factor", [0, 0.0, -1, float("nan"), float("inf")])
@pytest.mark.parametrize("make", [Capacity.fixed, Capacity.bounded])
def test_capacity_refuses(make, factor):
    with pytest.raises(ValueError, match="must be positive and finite"):
        make(factor)


def test_capacity_types():
    with pytest.raises(TypeError, match="factor='2' is not a number"):
        Capacity.fixed("2")
    with pytest.raises(TypeError, match="factor=None"):
        Capacity(mode="fixed")
    with pytest.raises(ValueError, match="takes none"):
        Capacity(mode="dropless", factor=1.0)
    with pytest.raises(ValueError, match="mode='elastic'"):
        Capacity(mode="elastic", factor=1.0)


def test_plan_refuses():
    with pytest.raises(ValueError, match="layout='flat'"):
        Plan(layout="flat")
    with pytest.raises(ValueError, match="expert_kernel='loop'"):
        Plan(expert_kernel="loop")
    with pytest.raises(ValueError, match="needs layout='padded', not 'ragged'"):
        Plan(expert_kernel="bmm")
    with pytest.raises(ValueError, match="tile_rows=0"):
        Plan(tile_rows=0)
    with pytest.raises(ValueError, match=r"tile_columns=2\.5"):
        Plan(tile_columns=2.5)


def test_plans_are_values():
    assert Plan(tile_rows=64) == Plan(tile_rows=64)
    assert len({Plan(), Plan(), Plan(layout="padded")}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        Plan().layout = "padded"


def test_needed_capacity_factor():
    def workload(**change):
        fields = {
            "tokens": 8,
            "top_k": 2,
            "num_experts": 4,
            "model_dim": 1,
            "hidden_dim": 1,
            "demand": 6,
            "capacity": None,
            "dtype": "float32",
            "device": "cpu",
            "training": True,
            "threads": 1,
        }
        return Workload(**{**fields, **change})

    assert workload().needed_capacity_factor == 6 * 4 / 16
    assert workload(tokens=0, demand=0).needed_capacity_factor == 0
    assert workload(demand=None).needed_capacity_factor is None
