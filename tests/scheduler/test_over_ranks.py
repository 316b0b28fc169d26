"""Schedulers of several ranks: one answer, or one error on all of them."""

import pytest
import torch
import torch.distributed as dist

from tests.cases import tensor
from tests.comm.test_failures import caught
from tests.scheduler.cases import HARDWARE, candidate, known, record
from tutelx import Capacity, MoE, Plan, Scheduler
from tutelx.planner import RulePlanner
from tutelx.scheduler import Exploring
from tutelx.tuning.key import Key
from tutelx.tuning.records import StoredPlan

FEW = Exploring(rounds=2, warmup=0, window=2)


def layer(group, planner, **more):
    torch.manual_seed(0)
    return MoE(
        **{"model_dim": 4, "hidden_dim": 8, "num_experts": 4, **more}, dtype=torch.float64, mesh=group, planner=planner
    )


def cost(plan: Plan) -> float:
    return 0.2 if plan.shard_degree == 0 else 1.0 + plan.pipeline_degree


class Told(Scheduler):
    """Its clock is a table, and on rank 1 it goes wrong now and then."""

    def observe(self, decision, seconds):
        if seconds is not None:
            late = 1.5 if dist.get_rank() == 1 else 1.0
            seconds = late * cost(decision.plan)
        super().observe(decision, seconds)


def losses(group, planner, steps):
    # At most 2 of 6 rows an expert: every step falls into one bucket.
    moe = layer(group, planner, capacity=Capacity.fixed(0.5))
    optimizer = torch.optim.SGD(moe.parameters(), lr=0.1)
    found, plans = [], []
    for step in range(steps):
        optimizer.zero_grad()
        x = tensor(6, 4, dtype=torch.float64, seed=10 * step + dist.get_rank(group), grad=dist.get_rank(group) == 0)
        loss = moe(x).square().mean()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
        plans.append(moe.last_decision.plan)
    return found, plans, moe.last_decision.source, moe.last_decision.measured_seconds


def explored(group):
    online = losses(group, Told([], "online", exploring=FEW, hardware=HARDWARE), 30)
    return online, losses(group, RulePlanner(), 30)


def test_ranks_explore_together_and_every_step_is_correct(ranks):
    answers = ranks(2).run(explored)
    plans = answers[0][0][1]
    for online, straight in answers:
        assert online[1] == plans, "all ranks run the same plans"
        torch.testing.assert_close(torch.tensor(online[0]), torch.tensor(straight[0]), rtol=1e-9, atol=0)
        assert online[2] == "online"
    assert {plan.shard_degree for plan in plans} == {0, 1}
    assert plans[-1].shard_degree == 0
    assert answers[0][0][3] == answers[1][0][3] == pytest.approx(0.2 * 1.5), "the slowest rank counts"


def settings_differ(group, ours, theirs):
    mine = theirs if dist.get_rank(group) == 1 else ours
    planner = RulePlanner() if mine is None else Scheduler([], **mine)
    moe = layer(group, planner)
    first = caught(moe, tensor(5, 4, dtype=torch.float64))
    moe.planner = RulePlanner()
    return first, caught(moe, tensor(5, 4, dtype=torch.float64))


@pytest.mark.parametrize(
    ("ours", "theirs", "text"),
    [
        ({}, {"mode": "online"}, "rank 1 has mode='online', rank 0 has mode='lookup'"),
        ({}, {"exploring": Exploring(window=9)}, "rank 1 has window=9, rank 0 has window=64"),
        ({}, None, "rank 1 has planner='same on all ranks', rank 0 has planner='Scheduler new'"),
        (
            {},
            {"mode": "fixed", "plan": Plan(shard_degree=0)},
            "rank 1 has plan.shard_degree=0, rank 0 has plan.shard_degree=None",
        ),
    ],
)
def test_settings_that_differ(ranks, ours, theirs, text):
    for first, second in ranks(2).run(settings_differ, ours, theirs):
        assert first.startswith("RankMismatchError: ")
        assert text in first
        assert second == "fine"


def one_cannot_read(group, which):
    planner = Scheduler([])

    def broken(*_):
        raise OSError("no such disk")

    if dist.get_rank(group) == which:
        planner._source.snapshot = planner._source.restored = broken
    moe = layer(group, planner)
    x = tensor(5, 4, dtype=torch.float64)
    first = caught(moe, x)
    if dist.get_rank(group) == which:
        del planner._source.snapshot, planner._source.restored
    return first, caught(moe, x), moe.last_decision.source


@pytest.mark.parametrize("which", [0, 1])
def test_a_rank_that_fails_to_join(ranks, which):
    answers = ranks(2).run(one_cannot_read, which)
    assert answers[which][0] == "OSError: no such disk"
    other = f"RankFailedError: rank {which} failed before the exchange: OSError: no such disk"
    assert answers[1 - which][0] == other
    assert [answer[1:] for answer in answers] == [("fine", "default")] * 2, "the next call joins anew"


def one_joined_before(group):
    """Rank 1 goes on with a planner that has met, rank 0 brings a new one."""
    planner = Scheduler([])
    moe = layer(group, planner)
    x = tensor(5, 4, dtype=torch.float64)
    moe(x)
    if dist.get_rank(group) == 0:
        moe.planner = Scheduler([])
    first = caught(moe, x)
    moe.planner = planner
    return first, caught(moe, x)


def test_a_rank_that_has_met_and_one_that_has_not(ranks):
    for first, second in ranks(2).run(one_joined_before):
        assert first.startswith("RankMismatchError: rank 1 has planner='Scheduler since ")
        assert first.endswith("rank 0 has planner='Scheduler new'")
        assert second == "fine"


def messages(group):
    """Of the second call: how often ranks talk about it."""
    from tutelx.comm import agreement

    moe = layer(group, Scheduler([]))
    x = tensor(5, 4, dtype=torch.float64)
    moe(x)
    counted, gather = [], agreement._gather
    agreement._gather = lambda *arguments: counted.append(1) or gather(*arguments)
    try:
        moe(x)
    finally:
        agreement._gather = gather
    return len(counted)


def test_a_call_costs_one_message(ranks):
    assert ranks(2).run(messages) == [1, 1]


def databases_differ(group, records):
    """Each rank has a database of its own."""
    rank = dist.get_rank(group)
    planner = Scheduler(known(*([] if records[rank] is None else [records[rank]])))
    moe = layer(group, planner)
    x = tensor(5, 4, dtype=torch.float64, seed=rank)
    first = moe(x)
    decision = moe.last_decision
    moe.planner = RulePlanner()
    torch.testing.assert_close(moe(x), first, rtol=1e-9, atol=1e-12)
    return decision.plan, decision.source, decision.workload


def asked(group):
    moe = layer(group, RulePlanner())
    moe(tensor(5, 4, dtype=torch.float64, seed=dist.get_rank(group)))
    return moe.last_decision.workload


def test_all_ranks_answer_from_the_database_of_rank_0(ranks):
    key = Key.of(ranks(2).run(asked)[0])
    default = StoredPlan(layout="ragged", expert_kernel="tiled", shard_degree=1)
    slices = {
        degree: StoredPlan(
            layout="ragged", expert_kernel="tiled", shard_degree=0, tile_rows=64 * degree, tile_columns=256
        )
        for degree in (1, 2)
    }
    ours, theirs = (record(candidate(slices[d], 0.5), key=key, default=default) for d in (1, 2))
    for records in ([ours, theirs], [ours, None]):
        answers = ranks(2).run(databases_differ, records)
        assert {plan for plan, _, _ in answers} == {slices[1].plan(Plan())}
        assert {source for _, source, _ in answers} == {"exact"}
    answers = ranks(2).run(databases_differ, [None, theirs])
    assert {plan for plan, _, _ in answers} == {RulePlanner().plan(answers[0][2]).plan}
    assert {source for _, source, _ in answers} == {"default"}
