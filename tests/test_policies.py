"""Policies, on loads and times worked out by hand."""

import copy
import pickle

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.cases import tensor
from tutelx import Capacity, Decision, MoE, Plan
from tutelx.errors import InvalidTypeError, InvalidValueError
from tutelx.gates import BiasBalanced, Cosine, GroupLimited, NoisyTopK, TopK
from tutelx.policies import Call, LatencyBudget, ScheduledTopK, Seen, TargetDropRate


def seen(*rows, tokens=8, top_k=1):
    return Seen(counts=torch.tensor(rows), tokens=tokens, top_k=top_k)


def call(*recent, step=0, **more):
    return Call(**{"step": step, "training": True, "num_experts": 4, "recent": recent, **more})


def test_drops_that_a_factor_would_have_caused():
    # 8 slots on 4 experts: a factor of 1 allows 2 rows, so of 5, 1, 1, 1 three slots drop; 1.5 allows 3, two drop.
    assert seen([5, 1, 1, 1]).drop_rates([0.5, 1.0, 1.5, 2.0, 2.5]) == [4 / 8, 3 / 8, 2 / 8, 1 / 8, 0.0]
    # Two ranks, the limit for each of them: 5 - 2 and 3 - 2 of 16.
    assert seen([5, 1, 1, 1], [3, 2, 2, 1]).drop_rates([1.0]) == [4 / 16]
    assert seen([0, 0, 0, 0], tokens=0).drop_rates([1.0]) == [0.0]


def test_target_drop_rate():
    uneven = seen([5, 1, 1, 1])
    # Four buckets an octave: 1.0, 1.19, 1.41, 1.68, 2.0, 2.38, ...; rows are rounded up, so 1.19 allows 3 and 1.68
    # allows 4: rates 3/8, 2/8, 2/8, 1/8, 1/8, 0.
    for rate, factor in (
        (0.5, 0.25),
        (0.374, 2**0.25),
        (0.25, 2**0.25),
        (0.13, 2**0.75),
        (0.125, 2**0.75),
        (0, 2**1.25),
    ):
        assert TargetDropRate(rate=rate).capacity(call(uneven)) == Capacity.fixed(factor), rate
    # On average over the calls: at 1.19 the even one drops nothing, (2/8 + 0) / 2 = 1/8.
    even = seen([2, 2, 2, 2])
    assert TargetDropRate(rate=0.125).capacity(call(uneven, even)) == Capacity.fixed(2**0.25)
    assert TargetDropRate(rate=0.125, window=1).capacity(call(uneven, even)) == Capacity.fixed(2**0.75)
    assert TargetDropRate(rate=0.5).capacity(call()) == Capacity.dropless()


def test_a_layer_keeps_to_its_drop_rate():
    torch.manual_seed(0)
    layer = MoE(8, 16, 4, gate=TopK(k=1), capacity=TargetDropRate(rate=0.1))
    x = tensor(64, 8)
    layer(x)
    assert layer.last_decision.workload.capacity is None
    for _ in range(2):
        layer(x)
        assert layer.stats.drop_rate <= 0.1
    limit = layer.last_decision.workload.capacity
    asked = layer.stats.tokens_per_expert.tolist()
    # The bucket below would drop more; rows are rounded up.
    below = Capacity.fixed(limit / 16 * 2**-0.25).limit(tokens=64, top_k=1, num_experts=4)
    assert sum(max(0, n - below) for n in asked) > 0.1 * 64
    # Evaluation goes by its own calls, and a call's own capacity counts more.
    layer.eval()
    layer(x[:4])
    assert layer.last_decision.workload.capacity is None
    layer.train()
    layer(x)
    assert layer.last_decision.workload.capacity == limit
    layer(x, capacity=Capacity.fixed(1.0))
    assert layer.last_decision.workload.capacity == 16


def ks(layer, steps, **given):
    found = []
    for _ in range(steps):
        layer(tensor(6, 8), **given)
        found.append(layer.last_decision.workload.top_k)
    return found


def test_a_schedule_by_step():
    layer = MoE(8, 16, 4, top_k=ScheduledTopK({2: 3, 0: 1, 4: 2}))
    assert ks(layer, 3) == [1, 1, 3]
    layer.eval()
    assert ks(layer, 3) == [3, 3, 3], "evaluation has the K of its step, and is no step"
    layer.train()
    assert ks(layer, 1, top_k=4) == [4]
    state = layer.state_dict()
    assert ks(layer, 2) == [2, 2]
    resumed = MoE(8, 16, 4, top_k=ScheduledTopK({0: 1, 2: 3, 4: 2, 5: 1}))
    resumed.load_state_dict(state)
    assert ks(resumed, 2) == [2, 1]
    assert ks(copy.deepcopy(resumed), 1) == ks(pickle.loads(pickle.dumps(resumed)), 1) == [1]
    assert not any("policies" in name for name in MoE(8, 16, 4, capacity=TargetDropRate(rate=0.1)).state_dict())


def test_a_function_and_a_number():
    assert ks(MoE(8, 16, 4, top_k=lambda call: 1 + call.step % 2), 4) == [1, 2, 1, 2]
    assert ks(MoE(8, 16, 4, top_k=3), 2) == [3, 3]
    assert ks(MoE(8, 16, 4, top_k=3), 1, top_k=1) == [1]


@pytest.mark.parametrize(
    "gate",
    [TopK(), NoisyTopK(), Cosine(), GroupLimited(k=2, num_groups=2, kept_groups=1), BiasBalanced(k=2)],
    ids=lambda g: type(g).__name__,
)
def test_every_gate_that_takes_a_k(gate):
    assert ks(MoE(8, 16, 4, gate=gate, top_k=ScheduledTopK({0: 1, 1: 2})), 2) == [1, 2]


def test_latency_budget():
    def budget(seconds, **more):
        return LatencyBudget(seconds=seconds, **more).top_k(call(seen([2, 2, 2, 2]), seconds=lambda k: k / 8))

    # 1/8, 1/4, 3/8, 1/2 s with K = 1..4.
    assert [budget(s) for s in (0.1, 0.125, 0.3, 0.375, 9.0)] == [1, 1, 2, 3, 4]
    assert budget(9.0, most=2) == 2
    assert LatencyBudget(seconds=1.0).top_k(call(seconds=lambda k: 0.0)) is None, "no call was seen"
    assert LatencyBudget(seconds=1.0).top_k(call(seen([1, 1, 1, 1]))) is None, "nobody knows a time"


class Model:
    """Foresees a millisecond a slot."""

    same_on_all_ranks = True

    def plan(self, workload):
        return Decision(plan=Plan(), source="test", reason="", workload=workload)

    def seconds(self, workload):
        assert workload.demand <= workload.tokens
        return 1e-3 * workload.tokens * workload.top_k


def test_a_layer_keeps_to_its_budget():
    layer = MoE(8, 16, 4, top_k=LatencyBudget(seconds=0.019), planner=Model())
    # 6 tokens: 6 ms an expert; the first call has the gate's own 2.
    assert ks(layer, 3) == [2, 3, 3]
    assert ks(layer.eval(), 2) == [2, 3]


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputation_has_the_k_and_the_capacity_of_its_forward(reentrant):
    def build():
        torch.manual_seed(1)
        policies = {"top_k": ScheduledTopK({0: 1, 1: 2, 2: 3}), "capacity": TargetDropRate(rate=0.2, window=1)}
        return MoE(8, 16, 4, dtype=torch.float64, **policies)

    layer, straight = build(), build()
    xs = [tensor(20, 8, dtype=torch.float64, seed=i, grad=True) for i in range(4)]
    ys = [checkpoint(layer, x, use_reentrant=reentrant) for x in xs]
    expected = [x.detach().clone().requires_grad_() for x in xs]
    for y, x in zip(ys, expected):
        torch.testing.assert_close(y, straight(x), rtol=0, atol=0)
    for i in (1, 0, 3, 2):
        ys[i].square().sum().backward()
    for x in expected:
        x.grad = None
    again = build()
    for i, x in enumerate(expected):
        again(x).square().sum().backward()
        torch.testing.assert_close(xs[i].grad, x.grad, rtol=1e-12, atol=1e-14)
    assert ks(layer.double().float(), 1) == [3]
    assert layer.policies.count == 5, "a recomputation is no step"


@pytest.mark.parametrize(
    ("build", "error", "match"),
    [
        (lambda: TargetDropRate(rate=1.0), InvalidValueError, r"rate=1.0 is outside \[0, 1\)"),
        (lambda: TargetDropRate(rate=0.1, window=0), InvalidValueError, "window=0"),
        (lambda: ScheduledTopK({1: 2}), InvalidValueError, "no K for step 0"),
        (lambda: ScheduledTopK({0: 0}), InvalidValueError, "K=0 of the schedule"),
        (lambda: LatencyBudget(seconds=0), InvalidValueError, "seconds=0 must be above 0"),
        (lambda: LatencyBudget(seconds=1, most=0), InvalidValueError, "most=0"),
        (lambda: MoE(8, 16, 4, top_k="two"), InvalidTypeError, "top_k is str"),
        (lambda: MoE(8, 16, 4, top_k=0), InvalidValueError, "top_k=0"),
        (lambda: MoE(8, 16, 4, capacity=1.5), InvalidTypeError, "capacity is float"),
        (lambda: ks(MoE(8, 16, 4, top_k=lambda call: 0), 1), InvalidValueError, "gave top_k=0"),
        (lambda: ks(MoE(8, 16, 4, top_k=lambda call: 9), 1), InvalidValueError, "9 exceeds num_experts=4"),
    ],
)
def test_what_cannot_be(build, error, match):
    with pytest.raises(error, match=match):
        build()
