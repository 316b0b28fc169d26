"""Plans tried in real steps of a layer: the times are made up, the numbers are not."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.cases import tensor
from tests.scheduler.cases import HARDWARE, Found, Shelf, plan
from tutelx import Capacity, MoE, Plan, Scheduler
from tutelx.gates import ExpertChoice
from tutelx.planner import RulePlanner
from tutelx.scheduler import Exploring
from tutelx.scheduler import sources as module
from tutelx.tuning.records import StoredPlan

BMM = StoredPlan(layout="padded", expert_kernel="bmm")
PADDED = StoredPlan(layout="padded", expert_kernel="tiled")
EXPLORING = Exploring(rounds=2, warmup=1, window=3)


class Told(Scheduler):
    """Its clock is a table: seconds by expert kernel and layout. told: what it was told, plan by plan."""

    def __init__(self, db=(), mode="online", *, exploring=EXPLORING, **more):
        super().__init__(db, mode, exploring=exploring, **{"hardware": HARDWARE, **more})
        self.cost = {"ragged/tiled": 1.0, "padded/tiled": 3.0, "padded/bmm": 0.5}
        self.told = []

    def observe(self, decision, seconds):
        if seconds is not None:
            assert seconds > 0
            self.told.append(decision.plan)
            seconds = self.cost[f"{decision.plan.layout}/{decision.plan.expert_kernel}"]
        super().observe(decision, seconds)


@pytest.fixture(autouse=True)
def _plans(monkeypatch):
    monkeypatch.setattr(module, "possible_plans", lambda w: [plan(PADDED), plan(BMM)])


def train(layer, steps, *, dtype=torch.float64, forward=None, tokens=(12, 12)):
    """Losses of steps of SGD on microbatches of these many tokens."""
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    losses, plans = [], []
    for step in range(steps):
        optimizer.zero_grad()
        total = 0.0
        for i, n in enumerate(tokens):
            x = tensor(n, 8, dtype=dtype, seed=step * len(tokens) + i, grad=True)
            loss = (forward or layer)(x).square().mean() + layer.aux_loss
            loss.backward()
            total += float(loss.detach())
            plans.append(layer.last_decision.plan)
        optimizer.step()
        losses.append(total)
    return losses, plans


def moe(planner, **more):
    torch.manual_seed(3)
    return MoE(8, 16, 4, dtype=torch.float64, planner=planner, **more)


def test_it_converges_and_every_step_is_correct():
    planner = Told()
    layer = moe(planner)
    losses, plans = train(layer, 14)
    assert {p.layout for p in plans[:9]} == {"ragged", "padded"}
    assert layer.last_decision.plan.expert_kernel == "bmm"
    assert layer.last_decision.source == "online"
    assert "0.50 of the default's time in 2 rounds; 3 plans were tried" in layer.last_decision.reason
    assert layer.last_decision.measured_seconds == 0.5
    expected, _ = train(moe(RulePlanner()), 14)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-9, atol=0)


def test_a_plan_holds_for_a_whole_step():
    planner = Told()
    first, second = moe(planner), moe(planner)
    seen = []
    for step in range(8):
        x = tensor(12, 8, dtype=torch.float64, seed=step, grad=True)
        y = second(first(x))
        seen.append({first.last_decision.plan, second.last_decision.plan})
        y.sum().backward()
    # Loads of the two may lie in two buckets; where they are one, they share a plan.
    assert all(len(plans) <= 2 for plans in seen)
    one = moe(planner, capacity=Capacity.fixed(0.25))
    for step in range(6):
        x = tensor(12, 8, dtype=torch.float64, seed=step)
        plans = set()
        for _ in range(3):
            y = one(x)
            plans.add(one.last_decision.plan)
        assert len(plans) == 1
        y.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputation_sees_the_plan_of_its_forward(reentrant):
    """Two microbatches are outstanding, as in a pipeline, while plans change in between; expert choice gives both the
    same counts."""
    layer = moe(Told(), gate=ExpertChoice(k=1))
    straight = moe(RulePlanner(), gate=ExpertChoice(k=1))
    outstanding = []
    for step in range(9):
        x = tensor(12, 8, dtype=torch.float64, seed=step, grad=True)
        y = checkpoint(layer, x, use_reentrant=reentrant)
        outstanding.append((x, y))
        if len(outstanding) == 2:
            x, y = outstanding.pop(0)
            y.square().sum().backward()
            expected = x.detach().clone().requires_grad_()
            straight(expected).square().sum().backward()
            torch.testing.assert_close(x.grad, expected.grad, rtol=1e-9, atol=1e-12)
    for a, b in zip(layer.parameters(), straight.parameters()):
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12)


def test_inference_explores_call_by_call():
    planner = Told()
    layer = moe(planner)
    x = tensor(12, 8, dtype=torch.float64)
    with torch.no_grad():
        ys = [layer(x) for _ in range(10)]
    assert layer.last_decision.plan.expert_kernel == "bmm"
    assert len(planner.told) == 10
    for y in ys:
        torch.testing.assert_close(y, ys[0], rtol=1e-9, atol=1e-12)


def test_what_became_slow_is_examined_again():
    planner = Told()
    layer = moe(planner)
    x = tensor(12, 8, dtype=torch.float64)
    with torch.no_grad():
        for _ in range(10):
            layer(x)
        planner.cost["padded/bmm"] = 0.7  # less than 1.5 times its record
        for _ in range(8):
            layer(x)
        assert layer.last_decision.plan.expert_kernel == "bmm"
        assert planner.told[-1].layout != "ragged"
        planner.cost["padded/bmm"] = 5.0
        for _ in range(20):
            layer(x)
    assert layer.last_decision.plan.layout == "ragged"
    assert layer.last_decision.measured_seconds == 1.0


def test_what_was_measured_is_not_explored():
    planner = Told(Shelf(Found(plan(BMM), measured=0.5)))
    layer = moe(planner)
    plans = set(train(layer, 2)[1])
    assert {p.expert_kernel for p in plans} == {"bmm"}
    assert layer.last_decision.source == "exact"
    near = Told(Shelf(Found(plan(BMM), "nearest")))
    layer = moe(near)
    train(layer, 1)
    assert layer.last_decision.source == "online"


def test_other_planners_are_not_timed():
    layer = moe(Told(mode="lookup"))
    train(layer, 2)
    assert layer.planner.told == []
    layer(tensor(3, 8, dtype=torch.float64), plan=Plan())
    assert layer.planner.told == []
