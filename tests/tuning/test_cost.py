"""The cost model on machines with round rates, by hand; what must hold on any; bytes as the layer counts them."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.comm.test_bytes import ROW, ordered
from tutelx.errors import InvalidValueError
from tutelx.tuning.cost import SHEETS, Link, RateModel, Sheet, calibrate, from_hardware, sheet, workload_of
from tutelx.tuning.cost.links import exchange_seconds, gather_seconds, message_seconds
from tutelx.tuning.cost.pipeline import pipelined_seconds
from tutelx.tuning.cost.traffic import traffic
from tutelx.tuning.hardware import Hardware
from tutelx.tuning.key import Key
from tutelx.tuning.records import Candidate, Record, StoredPlan
from tutelx.types import Plan, Workload

ROUND = Sheet(
    name="round",
    device="cuda",
    products={"float32": 1e9},
    half_rows=0,
    memory_rate=1e9,
    start=0.0,
    chunk_start=0.0,
    interference=0.0,
    intra=Link(rate=1000.0, latency=0.0),
    inter=Link(rate=100.0, latency=1.0),
    ranks_per_node=2,
    source="made up",
)


def workload(**change):
    fields = {
        "tokens": 8,
        "top_k": 1,
        "num_experts": 4,
        "model_dim": 10,
        "hidden_dim": 10,
        "demand": 2,
        "capacity": None,
        "dtype": "float32",
        "device": "cuda",
        "training": False,
        "threads": 1,
        "world": 4,
        "ranks_per_node": 2,
        "expert_numbers": 200,
        "all_to_alls": ("linear", "2dh"),
        "shard_degrees": (0, 1),
    }
    return Workload(**{**fields, **change})


def test_a_link_by_hand():
    # 3 messages of 1 s, 200 bytes at 100 a second.
    assert message_seconds(Link(rate=100.0, latency=1.0), 3, 200) == 5
    # As many peers as the contention: half the rate.
    assert message_seconds(Link(rate=100.0, latency=1.0, contention=3), 3, 200) == 7
    assert message_seconds(Link(rate=100.0, latency=1.0), 0, 0) == 0


def test_an_exchange_by_hand():
    # 8 rows of 50 bytes on 2 nodes of 2: 2 rows for each rank. Linear: 1 message near, 2 far with 4 rows = 200 bytes:
    # 2 * 1 + 200 / 100 = 4 s. Two steps: 4 rows near (200 / 1000 = 0.2 s), then one message with 4 rows far (1 + 2 s),
    # and two copies of 400 bytes, read and written at half of 1e9 a second: 3.2e-6 s.
    moved = traffic(workload(), Plan(), 2)
    assert (moved.rows_out, moved.rows_in, moved.sent_near, moved.sent_far) == (8, 8, 2, 4)
    assert exchange_seconds(ROUND, moved, 50, hierarchical=False, chunks=1) == 4
    assert exchange_seconds(ROUND, moved, 50, hierarchical=True, chunks=1) == pytest.approx(3.2 + 3.2e-6, rel=1e-9)
    # Half of it in each of two chunks: the messages stay.
    assert exchange_seconds(ROUND, moved, 50, hierarchical=False, chunks=2) == 3


def test_a_gather_by_hand():
    # Each rank owns 200 numbers of 4 bytes. Of a node's 2 ranks each fetches one rank's 800 bytes from the other node
    # (1 + 8 s), while 2 nodes' worth, 1600 bytes, goes to the neighbour (1.6 s).
    moved = traffic(workload(), Plan(shard_degree=0), 2)
    assert (moved.gather, moved.own_numbers, moved.gathered_numbers) == (4, 200, 600)
    assert gather_seconds(ROUND, moved, 4, 2) == 9


def test_chunks_by_hand():
    assert pipelined_seconds(1, 3.0, 5.0, 0.5) == 11  # 3 + 5 + 3
    # Two chunks of 1.5, 2.5, 1.5: arrive at 1.5 and 3; computed at 4 and 6.5; back at 5.5 and 8.
    assert pipelined_seconds(2, 1.5, 2.5, 0.0) == 8
    assert pipelined_seconds(2, 1.5, 2.5, 0.5) == 9.5  # half of the 3 that were hidden are lost
    # Four of 1, 0.1, 1: the link never rests, but for the first chunk's 0.1 at most.
    assert pipelined_seconds(4, 1.0, 0.1, 0.0) == pytest.approx(8.0)


def test_a_call_by_hand():
    # One process, inference: 8 rows * 2 * 200 FLOP and the gate's 2 * 8 * 10 * 4 at 1e9 a second. Bytes: scores
    # 4*8*4 = 128; encode and decode 2 * (8 + 8) * 40 = 1280; hidden 2 * 8 * 40 = 640.
    cost = RateModel(replace(ROUND, products={"float32": 1e6})).predict(workload(world=1), Plan())
    assert cost.compute == pytest.approx((3200 + 640) / 1e6)
    assert cost.memory == pytest.approx(2048 / 1e9)
    assert (cost.exchange, cost.weights) == (0, 0)
    assert cost.total == pytest.approx(cost.compute + cost.memory)
    # Training: three times the products.
    trained = RateModel(replace(ROUND, products={"float32": 1e6})).predict(workload(world=1, training=True), Plan())
    assert trained.compute == pytest.approx(3 * cost.compute)


def test_the_fullest_rank_bounds():
    # Two experts a rank; of 32 rows from all ranks, 20 are for the last two experts.
    skewed = workload(num_experts=8, demand=20, load=(2, 2, 2, 2, 2, 2, 8, 12))
    assert traffic(skewed, Plan(), 2).rows_in == 20
    # Padded: each of 8 experts gets the fullest's 20 from each of 4 ranks.
    assert traffic(skewed, Plan(layout="padded"), 2).rows_in == 2 * 20 * 4
    # Unknown load over ranks: the fullest has 3 of a rank's 8 rows, the other 7 experts 5/7 each.
    assert traffic(workload(num_experts=8, demand=3), Plan(), 2).rows_in == pytest.approx(4 * (3 + 5 / 7))
    # A capacity cuts: at most 2 rows a rank and expert.
    assert traffic(replace(skewed, capacity=2), Plan(), 2).rows_in == 16


plans = st.builds(
    Plan,
    layout=st.sampled_from(["ragged", "padded"]),
    shard_degree=st.sampled_from([0, 1, 2, 4]),
    pipeline_degree=st.sampled_from([1, 2, 4, 8]),
    all_to_all=st.sampled_from(["linear", "2dh"]),
)
sheets = st.sampled_from(sorted(SHEETS))


@given(sheets, plans, st.booleans(), st.integers(0, 5000), st.integers(1, 5000), st.floats(1, 8))
def test_more_tokens_and_slower_machines_take_longer(name, plan, training, tokens, more, f):
    def seconds(sheet, tokens):
        w = workload(
            tokens=tokens,
            demand=math.ceil(f * tokens / 4),
            world=16,
            ranks_per_node=8,
            model_dim=256,
            hidden_dim=512,
            expert_numbers=2 * 256 * 512,
            training=training,
            device=sheet.device,
            shard_degrees=(0, 1, 2, 4),
        )
        return RateModel(sheet).predict(w, plan)

    base = SHEETS[name]
    cost = seconds(base, tokens)
    assert all(math.isfinite(part) and part >= 0 for part in vars(cost).values())
    assert seconds(base, tokens + more).total >= cost.total
    parts = cost.compute + cost.exchange + cost.weights + cost.memory
    if plan.pipeline_degree == 1 or plan.shard_degree == 0:
        assert cost.total == pytest.approx(parts)
    else:
        assert cost.total <= parts * (1 + 1e-9)
    slower = 1 + 1e-12
    for faster in (
        replace(base, intra=replace(base.intra, rate=2 * base.intra.rate)),
        replace(base, inter=replace(base.inter, rate=2 * base.inter.rate)),
        replace(base, memory_rate=2 * base.memory_rate),
        replace(base, products={dtype: 2 * rate for dtype, rate in base.products.items()}),
    ):
        assert seconds(faster, tokens).total <= cost.total * slower


@pytest.mark.parametrize(("num_experts", "degree"), [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 1), (4, 0), (1, 0)])
def test_bytes_are_those_that_the_layer_counts(ranks, num_experts, degree):
    # Four tokens a rank, dealt evenly to the experts; M = 4, H = 8, so P = 64 without biases.
    routes = [[t % num_experts for t in range(4)]] * 4
    plan = Plan(shard_degree=degree)
    answers = ranks(4).run(ordered, routes, plan, num_experts, False, None)
    degrees = (0, *(r for r in (1, 2, 4) if 4 // num_experts % r == 0))
    w = workload(tokens=4, num_experts=num_experts, demand=4 // num_experts, expert_numbers=64, shard_degrees=degrees)
    moved = traffic(w, plan, 2)
    for forward, *_ in answers:
        assert forward == (2 * (moved.sent_near + moved.sent_far) * ROW, moved.gathered_numbers * 8)


def test_sheets():
    with pytest.raises(InvalidValueError, match="hardware='a100' is none of a100-hdr"):
        sheet("a100")
    measured = Hardware(
        device="cuda", arch="sm_90", units=132, memory_bytes=1, memory_rate=4000.0, cache_bytes=1, inter_rate=40.0
    )
    found = from_hardware(measured).sheet
    # H200's 0.8 * 4800 GB/s is nearer than H100's 0.8 * 3350; what was not measured is the sheet's.
    assert (found.memory_rate, found.inter.rate) == (4e12, 4e10)
    assert found.intra == SHEETS["h200"].intra


def records(model):
    """As if measured on a machine that `model` describes exactly."""
    hardware = Hardware(device="cpu", arch="x86_64", units=2, memory_bytes=1, memory_rate=1.0, cache_bytes=1)
    for world in (1, 4):
        for tokens in (64, 512, 4096):
            key = Key(
                tokens=tokens,
                top_k=2,
                load_factor=1.0,
                num_experts=8,
                model_dim=256,
                hidden_dim=64,
                expert_numbers=2 * 256 * 64,
                dtype="float32",
                device="cpu",
                training=True,
                threads=1,
                world=world,
                ranks_per_node=4,
            )
            tried = [StoredPlan(layout="ragged", expert_kernel="tiled", pipeline_degree=d) for d in (1, 4)[:world]]
            candidates = tuple(
                Candidate(
                    plan=plan,
                    median=model.predict(workload_of(key), plan.plan(Plan())).total,
                    iqr=0.0,
                    n=5,
                    ratio=1.0,
                    error=0.0,
                )
                for plan in tried
            )
            yield Record(
                hardware=hardware, key=key, default=tried[0], candidates=candidates, software={}, provenance={}
            )


def test_calibration_finds_the_rates_of_a_machine():
    base = SHEETS["cpu-gloo"]
    real = replace(base, products={k: v / 4 for k, v in base.products.items()}, intra=Link(rate=2e8, latency=5e-5))
    fit = calibrate(records(RateModel(real)), base)
    assert fit.timings == 9
    assert fit.before > 0.5
    assert fit.after < 0.05
    assert fit.sheet.products["float32"] == pytest.approx(25e9, rel=0.15)
    assert fit.sheet.intra.rate == pytest.approx(2e8, rel=0.2)
    assert fit.sheet.inter == base.inter, "nothing went between nodes"
    assert calibrate(records(RateModel(real)), base) == fit


def test_calibration_leaves_out_what_it_cannot_use():
    good = list(records(RateModel(SHEETS["cpu-gloo"])))
    bad = replace(good[0], candidates=(replace(good[0].candidates[0], n=0, median=0.0, ratio=0.0, status="wrong"),))
    assert calibrate([bad], SHEETS["cpu-gloo"]).sheet == SHEETS["cpu-gloo"]
    assert calibrate(good, SHEETS["h100"]).timings == 0
