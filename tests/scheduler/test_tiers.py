"""Which tier answers, with what, and what is remembered; all by hand."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tutelx
from tests.scheduler.cases import BMM, DEFAULT, SMALL, Found, Shelf, candidate, known, plan, record, workload
from tutelx import MoE, Plan, Scheduler
from tutelx.errors import InvalidValueError
from tutelx.planner import RulePlanner
from tutelx.scheduler import default_planner
from tutelx.scheduler.memo import Memo, bucket_of
from tutelx.tuning.key import Key
from tutelx.tuning.records import StoredPlan


def decide(*records, **change):
    return Scheduler(known(*records)).plan(workload(**change))


def test_without_a_record_the_rules_answer():
    for change in ({}, {"demand": 3000}, {"demand": None}, {"tokens": 0, "demand": 0}, {"layouts": ("padded",)}):
        for decision in (decide(**change), Scheduler(Shelf(None)).plan(workload(**change))):
            assert decision.plan == RulePlanner().plan(workload(**change)).plan
            assert (decision.source, decision.measured_seconds) == ("default", None)
            assert decision.workload == workload(**change)


def test_an_exact_record_answers_with_its_best():
    found = record(candidate(BMM, 0.7), candidate(SMALL, 0.9))
    decision = decide(found)
    assert decision.plan == Plan(layout="padded", expert_kernel="bmm", tile_rows=256)  # 150 rows: tiles of 256
    assert (decision.source, decision.measured_seconds) == ("exact", pytest.approx(0.01 * 0.7))
    assert "0.70 of the default's time; measured for this key" in decision.reason
    # What cannot run here is passed over, and so is what is no gain beyond its spread.
    assert decide(found, expert_kernels=("tiled",)).plan == plan(SMALL)
    unsure = record(candidate(BMM, 0.7), candidate(SMALL, 0.9, spread=0.2))
    decision = decide(unsure, expert_kernels=("tiled",))
    assert decision.plan == RulePlanner().plan(workload()).plan
    assert (decision.source, decision.measured_seconds) == ("exact", pytest.approx(0.01))


def test_wrong_or_impossible_plans_are_never_chosen():
    far = [
        candidate(BMM, 0.1, status="wrong", error=0.5),
        candidate(StoredPlan(layout="ragged", expert_kernel="grouped"), 0.2),
        candidate(StoredPlan(layout="ragged", expert_kernel="tiled", pipeline_degree=2), 0.3),
        candidate(StoredPlan(layout="ragged", expert_kernel="tiled", shard_degree=4), 0.3),
        candidate(StoredPlan(layout="ragged", expert_kernel="tiled", all_to_all="2dh"), 0.3),
        candidate(StoredPlan(layout="ragged", expert_kernel="tiled", tile_rows=2**30, tile_columns=1), 0.3),
    ]
    assert decide(record(*far)).plan == RulePlanner().plan(workload()).plan
    for each in far[1:]:
        decision = Scheduler(Shelf(Found(each.plan.plan(Plan()), "nearest"))).plan(workload())
        assert decision.plan == RulePlanner().plan(workload()).plan, "whoever looks it up, it is checked"
        assert decision.source == "default"
        assert "cannot run here" in decision.reason


def test_tiles_that_were_not_stored_follow_the_load_at_hand():
    best = StoredPlan(layout="padded", expert_kernel="tiled")
    scheduler = Scheduler(known(record(candidate(best, 0.5))))
    # 8192 slots are 128 an expert. 600 rows are two octaves off, within reach, and have larger tiles.
    for demand in (150, 151, 600):
        ruled = RulePlanner().plan(workload(demand=demand)).plan
        assert scheduler.plan(workload(demand=demand)).plan == plan(
            best, tile_rows=ruled.tile_rows, tile_columns=ruled.tile_columns
        )


def test_one_bucket_is_looked_up_once():
    shelf = Shelf(Found(plan(BMM)))
    scheduler = Scheduler(shelf)
    # Four buckets an octave: 4096..5119 is one. 150 to 151 rows of 8192/64 are one factor.
    decisions = [scheduler.plan(workload(tokens=tokens, demand=150)) for tokens in (4096, 4097, 4200)]
    assert shelf.asked == 1
    assert [d.workload.tokens for d in decisions] == [4096, 4097, 4200], "a decision has the call's own workload"
    scheduler.plan(workload(tokens=5120, demand=188))
    assert shelf.asked == 2


def test_times_and_many_ranks_are_looked_up_once_too():
    shelf = Shelf(Found(plan(BMM), predicted=0.5))
    scheduler = Scheduler(shelf)
    assert [scheduler.seconds(workload(tokens=tokens)) for tokens in (4096, 4097, 4096)] == [0.5] * 3
    assert shelf.asked == 1
    for tokens in (4096, 4097, 4200):
        scheduler.plan(workload(tokens=tokens, world=4, shard_degrees=(0, 1, 2)))
    assert shelf.asked == 2


@given(
    st.tuples(*[st.sampled_from([64, 65, 512, 700, 4096])] * 2),
    st.tuples(*[st.sampled_from([None, 8, 9, 40, 4000])] * 2),
    st.tuples(*[st.sampled_from([None, 16, 300])] * 2),
    st.sampled_from([("cpu", 1), ("cuda", 1), ("cpu", 4)]),
)
def test_equal_buckets_have_equal_keys_and_equal_rules(tokens, demands, capacities, where):
    device, world = where
    two = [
        workload(tokens=t, demand=d, capacity=c, device=device, world=world, shard_degrees=(0, 1))
        for t, d, c in zip(tokens, demands, capacities)
    ]
    if bucket_of(two[0]) == bucket_of(two[1]):
        assert Key.of(two[0]) == Key.of(two[1])
        assert RulePlanner().plan(two[0]).plan == RulePlanner().plan(two[1]).plan
    # A default answer that was remembered is that of the rules.
    scheduler = Scheduler(Shelf(None))
    for w in two * 2:
        assert scheduler.plan(w).plan == RulePlanner().plan(w).plan


def test_the_memo_is_bounded():
    memo = Memo[int](8)
    for i in range(100):
        memo.keep((i,), i)
        assert memo.get((i,)) == i
        assert len(memo) <= 8
    assert memo.get((0,)) is None


def test_fixed_answers_stay():
    shelf = Shelf(Found(plan(BMM)))
    scheduler = Scheduler(shelf, "fixed")
    first = scheduler.plan(workload())
    shelf.found = None
    assert scheduler.plan(workload(tokens=1, demand=1)).plan == first.plan
    assert scheduler.plan(workload(model_dim=64)).plan != first.plan, "another layer has its own"
    given = Scheduler(mode="fixed", plan=Plan(layout="padded"))
    assert given.plan(workload()).plan == Plan(layout="padded")
    with pytest.raises(InvalidValueError, match="plan=padded/256x1024 was given, but mode='lookup'"):
        Scheduler(plan=Plan(layout="padded"))
    with pytest.raises(InvalidValueError, match="mode='of'"):
        Scheduler(mode="of")


def test_explain():
    shelf = Shelf(Found(plan(BMM), measured=0.007, predicted=0.008))
    assert Scheduler(shelf).explain(workload()).splitlines() == [
        "padded/bmm (exact): as measured",
        "measured: 7.000e-03 s",
        "predicted: 8.000e-03 s",
        "the rules would run ragged/256x1024",
    ]


def test_the_default_planner(monkeypatch):
    monkeypatch.delenv("TUTELX_PLANNER")
    first, second = MoE(4, 8, 2), MoE(4, 8, 2)
    assert isinstance(first.planner, Scheduler)
    assert first.planner is second.planner is default_planner()
    assert copy.deepcopy(first).planner is first.planner
    assert pickle.loads(pickle.dumps(first.planner)) is first.planner
    other = pickle.loads(pickle.dumps(Scheduler(mode="fixed", plan=Plan(layout="padded"))))
    assert other.always == Plan(layout="padded")
    monkeypatch.setenv("TUTELX_PLANNER", "rules")
    assert isinstance(MoE(4, 8, 2).planner, RulePlanner)
    monkeypatch.setenv("TUTELX_PLANNER", "best")
    with pytest.raises(InvalidValueError, match="TUTELX_PLANNER='best' is none of"):
        MoE(4, 8, 2)


def test_a_layer_runs_what_is_looked_up():
    layer = tutelx.MoE(8, 16, 4, planner=Scheduler(Shelf(Found(plan(BMM)))))
    x = torch.randn(10, 8)
    y = layer(x)
    assert layer.last_decision.plan.expert_kernel == "bmm"
    assert layer.last_decision.source == "exact"
    layer.planner = Scheduler(Shelf(None))
    torch.testing.assert_close(layer(x), y)
    assert layer.last_decision.source == "default"
    assert StoredPlan.of(layer.last_decision.plan, layer.last_decision.plan) == DEFAULT
