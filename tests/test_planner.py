"""The rules, on loads worked out by hand."""

import pytest

from tutelx.planner import FixedPlanner, RulePlanner
from tutelx.types import Plan, Workload


def decide(**change):
    fields = {
        "tokens": 4096,
        "top_k": 2,
        "num_experts": 64,
        "model_dim": 128,
        "hidden_dim": 256,
        "demand": 150,
        "capacity": None,
        "dtype": "float32",
        "device": "cpu",
        "training": True,
        "threads": 2,
    }
    return RulePlanner().plan(Workload(**{**fields, **change}))


def test_balanced_load_keeps_experts_whole():
    # 8192 rows, 4096 a thread; 150 is under half of that, and 256 is the next power of two.
    decision = decide()
    assert decision.plan == Plan(layout="ragged", tile_rows=256, tile_columns=1024)
    assert decision.source == "rule"
    assert "balanced: the fullest expert has 150 of 8192 rows" in decision.reason


def test_skewed_load_cuts_the_fullest_expert():
    # 3000 of 8192 is over half a thread's 4096: tiles of a quarter of that.
    decision = decide(demand=3000)
    assert decision.plan.tile_rows == 1024
    assert "skewed" in decision.reason
    # With 8 threads a share is 1024 rows: 600 is over half, tiles of 256.
    assert decide(demand=600, threads=8).plan.tile_rows == 256


def test_capacity_bounds_the_fullest_expert():
    assert "balanced: the fullest expert has 128" in decide(demand=8000, capacity=128).reason


def test_few_rows_are_cut_by_column():
    assert decide(tokens=1, demand=1).plan == Plan(layout="ragged", tile_rows=64, tile_columns=256)


@pytest.mark.parametrize("tokens", [0, 1, 7, 100_000])
@pytest.mark.parametrize("demand", [0, 1, 7, 100_000])
def test_every_load_has_a_plan(tokens, demand):
    plan = decide(tokens=tokens, demand=demand).plan
    assert 64 <= plan.tile_rows <= 1024


def test_padded_only_and_unknown_load():
    assert decide(layouts=("padded",)).plan.layout == "padded"
    unknown = decide(demand=None)
    assert (unknown.plan, unknown.source) == (Plan(), "default")


def on_cuda(**change):
    return decide(device="cuda", demand=None, **change)


def test_an_accelerator_groups_where_it_can():
    decision = on_cuda(expert_kernels=("tiled", "bmm", "grouped"))
    assert decision.plan == Plan(layout="ragged", expert_kernel="grouped")
    assert decision.source == "rule"


def test_an_accelerator_pads_for_a_batched_product_within_reason():
    # 8192 slots; 256 rows for each of 64 experts are 16384, twice as many; 257 are more.
    kernels = ("tiled", "bmm")
    assert on_cuda(expert_kernels=kernels, capacity=256).plan == Plan(layout="padded", expert_kernel="bmm")
    too_many = on_cuda(expert_kernels=kernels, capacity=257)
    assert too_many.plan == Plan()
    assert "16448 padded rows for 8192 slots are too many" in too_many.reason
    assert on_cuda(expert_kernels=kernels).plan == Plan(), "dropless: the padding is not known"
    assert on_cuda(expert_kernels=kernels, layouts=("ragged",), capacity=1).plan == Plan()


def test_an_accelerator_runs_what_is_left():
    assert on_cuda().plan == Plan()
    assert on_cuda(layouts=("padded",)).plan == Plan(layout="padded")


def test_fixed():
    plan = Plan(layout="padded")
    assert FixedPlanner(plan).plan(decide().workload).plan is plan


def test_the_degree_that_sends_the_fewest_numbers():
    # One expert of 1000 numbers on 4 ranks, M = 10, K = 1, T tokens, inference. A rank owns 250 of the expert.
    # r = 0: 250 * 3 = 750 whatever T. r = 1: 750, and rows there and back: 2 * 10T * 3/4 = 15T.
    # r = 2: 250 * 1, and 30T. r = 4: 60T. So 4 up to 8 tokens (480; 2 gives 490), 2 up to 16 (730), then 0.
    ranks = {"world": 4, "num_experts": 1, "top_k": 1, "model_dim": 10, "expert_numbers": 1000, "training": False}
    chosen = {
        tokens: decide(**ranks, tokens=tokens, demand=tokens, shard_degrees=(0, 1, 2, 4)).plan.shard_degree
        for tokens in (1, 8, 9, 16, 17, 1000)
    }
    assert chosen == {1: 4, 8: 4, 9: 2, 16: 2, 17: 0, 1000: 0}
    decision = decide(**ranks, tokens=8, demand=8, shard_degrees=(0, 1, 2, 4))
    assert decision.reason.endswith(
        "7.50e+02 at degree 0, 8.70e+02 at degree 1, 4.90e+02 at degree 2, 4.80e+02 at degree 4"
    )
    # Training: rows twice, weights three times: at 9 tokens 2 * 540 against 3 * 250 + 2 * 270 and 3 * 750.
    assert decide(**{**ranks, "training": True}, tokens=9, demand=9, shard_degrees=(0, 1, 2, 4)).plan.shard_degree == 4
