"""What ranks do to each other: every mistake is an error on every rank, named, and never a hang or the end of the
process."""

import os
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import distributed_c10d as c10d

from tests.cases import tensor
from tutelx import Capacity, MoE, Plan
from tutelx.comm import failures
from tutelx.errors import RankFailedError, RankMismatchError
from tutelx.gates import TopK
from tutelx.planner import FixedPlanner, RulePlanner
from tutelx.types import Decision


def caught(function, *arguments, **named):
    """The error's type and text, "fine" if there is none."""
    try:
        function(*arguments, **named)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "fine"


def layer(group, **change):
    torch.manual_seed(0)
    sizes = {"model_dim": 4, "hidden_dim": 8, "num_experts": 4, **change}
    return MoE(**sizes, mesh=group)


def differing(group, build, call, dtypes):
    """Rank 1 differs from the others; after the error all call again alike, in the same group."""
    rank = dist.get_rank(group)
    own_build, own_call = (build, call) if rank == 1 else ({}, {})
    dtype = dtypes[1 if rank == 1 else 0]
    model_dim = own_build.get("model_dim", 4)
    moe = layer(group, dtype=dtype, **own_build)
    first = caught(moe, tensor(5, model_dim, dtype=dtype), **own_call)
    return first, caught(layer(group), tensor(5, 4))


F32 = (torch.float32, torch.float32)


@pytest.mark.parametrize(
    ("build", "call", "dtypes", "field", "theirs", "ours"),
    [
        ({"model_dim": 6}, {}, F32, "model_dim", 6, 4),
        ({"hidden_dim": 12}, {}, F32, "hidden_dim", 12, 8),
        ({"num_experts": 6}, {}, F32, "num_experts", 6, 4),
        ({"num_experts": 1100}, {}, F32, "num_experts", 1100, 4),
        ({"experts": "ffn"}, {}, F32, "experts", "'ffn gelu'", "'gated silu'"),
        ({"bias": True}, {}, F32, "experts", "'gated silu bias'", "'gated silu'"),
        ({}, {"top_k": 3}, F32, "top_k", 3, 2),
        ({}, {"capacity": Capacity.fixed(1.25)}, F32, "capacity_factor", 1.25, None),
        ({}, {"plan": Plan(pipeline_degree=2)}, F32, "plan.pipeline_degree", 2, None),
        ({}, {}, (torch.float32, torch.float64), "dtype", "'float64'", "'float32'"),
        ({"planner": FixedPlanner(Plan(shard_degree=0))}, {}, F32, "plan.shard_degree", 0, None),
    ],
)
def test_ranks_that_differ(ranks, build, call, dtypes, field, theirs, ours):
    answers = ranks(4).run(differing, build, call, dtypes)
    assert len({first for first, _ in answers}) == 1, "all ranks say the same"
    assert answers[0][0].startswith("RankMismatchError: ")
    assert f"rank 1 has {field}={theirs}, rank 0 has {field}={ours}" in answers[0][0]
    assert "rank 2" not in answers[0][0]
    assert all(second == "fine" for _, second in answers), "nothing was sent, the group is still good"


class Stubborn:
    """A planner that every rank has its own of, and that does not say otherwise."""

    def __init__(self, plan: Plan) -> None:
        self.mine = plan

    def plan(self, workload) -> Decision:
        return Decision(plan=self.mine, source="test", reason="", workload=workload)


class Broken:
    def plan(self, workload) -> Decision:
        raise KeyError("no such plan")


def planners_differ(group, broken):
    other = Broken() if broken else Stubborn(Plan(pipeline_degree=4))
    planner = other if dist.get_rank(group) == 2 else Stubborn(Plan())
    moe = layer(group, planner=planner)
    first = caught(moe, tensor(5, 4))
    moe.planner = RulePlanner()
    return first, caught(moe, tensor(5, 4))


def test_planners_that_differ(ranks):
    answers = ranks(4).run(planners_differ, False)
    assert {first for first, _ in answers} == {
        "RankMismatchError: rank 2 has plan.pipeline_degree=4, rank 0 has plan.pipeline_degree=1"
    }
    assert all(second == "fine" for _, second in answers)
    answers = ranks(4).run(planners_differ, True)
    assert answers[2] == ("KeyError: 'no such plan'", "fine")
    for rank in (0, 1, 3):
        assert answers[rank][0] == "RankFailedError: rank 2 failed before the exchange: KeyError: 'no such plan'"
        assert answers[rank][1] == "fine"


def one_cannot_start(group):
    moe = layer(group)
    x = tensor(5, 4)
    if dist.get_rank(group) == 1:
        x[0, 0] = float("nan")
    first = caught(moe, x)
    shape = caught(moe, tensor(5, 3 if dist.get_rank(group) == 0 else 4))
    return first, shape, caught(moe, tensor(5, 4))


def test_a_rank_whose_own_input_is_bad(ranks):
    answers = ranks(2).run(one_cannot_start)
    assert answers[1][0].startswith("ValueError: logits[0,0]=nan")
    assert answers[0][0].startswith("RankFailedError: rank 1 failed before the exchange: ValueError: logits[0,0]=nan")
    assert answers[0][1] == "InvalidValueError: x has shape (5, 3), expected [..., model_dim=4]"
    assert "rank 0 failed before the exchange: InvalidValueError: x has shape (5, 3)" in answers[1][1]
    assert [third for _, _, third in answers] == ["fine", "fine"]


def plans_that_cannot_run(group):
    moe = layer(group)
    return [
        caught(moe, tensor(5, 4), plan=Plan(shard_degree=2)),
        caught(moe, tensor(5, 4), plan=Plan(all_to_all="2dh")),
        caught(moe, tensor(5, 4), plan=Plan(pipeline_degree=3)),
    ]


def test_plans_that_cannot_run(ranks):
    for answers in ranks(2).run(plans_that_cannot_run):
        assert answers == [
            "InvalidValueError: plan.shard_degree=2, but these experts run on 2 ranks (0, 1)",
            "InvalidValueError: plan.all_to_all='2dh', but with ranks_per_node=None there is ('linear',)",
            "fine",
        ]


def test_without_a_mesh():
    alone = MoE(4, 8, 4)
    with pytest.raises(ValueError, match=r"plan.shard_degree=0, but these experts run on 1 ranks \(1,\)"):
        alone(tensor(5, 4), plan=Plan(shard_degree=0))
    with pytest.raises(ValueError, match=r"plan.pipeline_degree=2, but the layer has no mesh"):
        alone(tensor(5, 4), plan=Plan(pipeline_degree=2))
    with pytest.raises(ValueError, match="ranks_per_node=2 was given, but mesh is None"):
        MoE(4, 8, 4, ranks_per_node=2)


class Expert(nn.Linear):
    """Does `how` when its rows are there, or their gradients."""

    how = ""

    def forward(self, rows):
        self.happens("inside")
        out = super().forward(rows)
        if out.requires_grad:
            out.register_hook(lambda gradient: self.happens("in backward"))
        return out

    def happens(self, where):
        if self.how == f"dies {where}":
            os._exit(1)
        if self.how == f"fails {where}":
            raise ZeroDivisionError("the expert gave up")
        if self.how == f"hangs {where}":
            c10d._get_default_store().wait(["over"])
            os._exit(1)


def short_group(seconds):
    return dist.new_group(list(range(dist.get_world_size())), timeout=timedelta(seconds=seconds))


def step(moe, plan):
    """Rank 0 has a token for every expert, the others for the first: rank 1 waits for rank 0 alone."""
    rows = [0, 1, 2] if dist.get_rank() == 0 else [0, 0, 0]
    moe(torch.eye(4)[rows].requires_grad_(), plan=plan).sum().backward()


def no_store(*_):
    raise ConnectionError("its host is gone")


def lost(_, how, seconds, plan, store=True):
    """What the others are told about rank 2, and whether in time."""
    group = short_group(seconds)
    rank = dist.get_rank(group)
    torch.manual_seed(0)
    expert = Expert(4, 4)
    moe = MoE(4, 8, 3, gate=TopK(k=1), experts=nn.ModuleList([expert]), mesh=group, ranks_per_node=1)
    moe.gate.weight.data = torch.eye(3, 4)
    assert caught(step, moe, plan) == "fine"
    if rank == 2:
        expert.how = how
    dist.barrier()
    if not store:
        failures._publish = no_store
    begin = time.monotonic()
    if rank == 2 and how == "dies":
        os._exit(1)
    answer = "stays away" if rank == 2 and how == "stays away" else caught(step, moe, plan)
    took = time.monotonic() - begin
    c10d._get_default_store().set("over", "")
    dist.barrier() if how == "stays away" else None
    return answer, took


@pytest.mark.parametrize(
    ("how", "plan", "seconds", "told"),
    [
        ("dies", Plan(), 1, "rank 2 did not take part: "),
        ("stays away", Plan(), 1, "rank 2 did not take part: "),
        # Connections broke: what remains of the group's timeout is not waited for.
        ("dies inside", Plan(), 60, "rank 2 died, hangs or is late: "),
        ("dies in backward", Plan(all_to_all="2dh", pipeline_degree=2), 2, "rank 2 died, hangs or is late: "),
        ("hangs inside", Plan(), 4, "rank 2 died, hangs or is late: "),
        (
            "fails inside",
            Plan(pipeline_degree=4),
            2,
            "rank 2 failed in the call: ZeroDivisionError: the expert gave up",
        ),
    ],
)
def test_a_rank_that_is_lost(how, plan, seconds, told):
    from tests.ranks import Ranks

    world = Ranks(3, timeout=60)
    try:
        gone = [2] if how.startswith(("dies", "hangs")) else []
        answers = world.run(lost, how, seconds, plan, timeout=60, dying=gone)
    finally:
        world.stop()
    if how.startswith("fails"):
        assert answers[2][0] == "ZeroDivisionError: the expert gave up"
    for rank, (answer, took) in enumerate(answers[:2]):
        assert took < 20
        if rank == 1 and answer == "fine":
            # It waits for rank 0 alone, which may have sent it everything before rank 2 was gone.
            assert how == "dies in backward"
            continue
        assert answer.startswith(f"RankFailedError: {told}")
        assert "rank 1 " not in answer
        assert "rank 0 " not in answer


def test_without_a_store_the_broken_connection_is_named():
    from tests.ranks import Ranks

    world = Ranks(3, timeout=60)
    try:
        first = world.run(lost, "dies inside", 2, Plan(), False, timeout=60, dying=[2])[0][0]
    finally:
        world.stop()
    assert first.startswith("RankFailedError: rank 2 has closed its connection; ")
    assert "rank 1 " not in first


def test_errors_are_what_torch_users_catch():
    assert issubclass(RankFailedError, RuntimeError)
    assert issubclass(RankMismatchError, RuntimeError)


def gates_drop_for_themselves(group):
    moe = MoE(4, 8, 4, gate=TopK(k=1), capacity=Capacity.bounded(1.0), mesh=group)
    rank = dist.get_rank(group)
    moe(tensor(4 + 4 * rank, 4, seed=rank), plan=Plan(layout="padded"))
    return moe.stats.capacity, moe.last_decision.workload


def test_the_workload_is_the_same_on_all_ranks(ranks):
    answers = ranks(2).run(gates_drop_for_themselves)
    # The most tokens of any rank are 8: the limit is 1 * 1 * 8 / 4 = 2 on both.
    assert [capacity for capacity, _ in answers] == [2, 2]
    assert answers[0][1] == answers[1][1]
    assert (answers[0][1].tokens, answers[0][1].world, sum(answers[0][1].load)) == (8, 2, 12)
