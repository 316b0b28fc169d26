"""Layers over many ranks in training: DDP, checkpointing, autocast, other groups, custom experts."""

import copy
from itertools import cycle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from tests.cases import tensor
from tests.comm.cases import Case, check, run_cases
from tests.tolerance import assert_close
from tutelx import MoE, Plan, parallel
from tutelx.gates import TopK
from tutelx.types import Decision

SWITCHING = [
    Plan(shard_degree=0),
    Plan(shard_degree=1, pipeline_degree=2),
    Plan(shard_degree=2, layout="padded"),
    Plan(shard_degree=4, all_to_all="2dh", pipeline_degree=4),
    Plan(shard_degree=2, all_to_all="2dh"),
]


def train(group, plans, steps):
    """Losses of all ranks together, and whether every parameter, gradient and optimizer state stayed where it was."""
    rank = dist.get_rank(group)
    torch.manual_seed(1)
    moe = MoE(4, 8, 1, gate=TopK(k=1), experts="gated", bias=True, mesh=group, ranks_per_node=2, dtype=torch.float64)
    optimizer = torch.optim.AdamW(moe.parameters(), lr=1e-2)
    losses, places = [], set()
    moved = 0
    for step, plan in zip(range(steps), cycle(plans)):
        x, target = (tensor(6, 4, dtype=torch.float64, seed=seed + 10 * rank) for seed in (step, 1000))
        loss = (moe(x, plan=plan) - target).square().mean()
        optimizer.zero_grad(set_to_none=False)
        loss.backward()
        for parameter in moe.gate.parameters():
            dist.all_reduce(parameter.grad, group=group)
        before = [p.data_ptr() for p in moe.parameters()]
        optimizer.step()
        if step > 0:
            states = [s["exp_avg"].data_ptr() for s in optimizer.state.values()]
            places.add(
                tuple([p.data_ptr() for p in moe.parameters()] + [p.grad.data_ptr() for p in moe.parameters()] + states)
            )
        moved += before != [p.data_ptr() for p in moe.parameters()]
        total = loss.detach().clone()
        dist.all_reduce(total, group=group)
        losses.append(total.item())
    return losses, len(places), moved


def test_switching_the_degree_every_step_gives_the_curve_of_a_fixed_one(ranks):
    fixed = ranks(4).run(train, [Plan(shard_degree=1)], 50)
    switched = ranks(4).run(train, SWITCHING, 50)
    for rank in range(4):
        assert switched[rank][0] == pytest.approx(fixed[rank][0], rel=1e-9)
        assert switched[rank][1:] == (1, 0), "weights, gradients and optimizer state are the same memory throughout"
    assert fixed[0][0][-1] < 0.9 * fixed[0][0][0]


@pytest.mark.parametrize("members", [(1, 3), (0, 2, 3), (2,)], ids=str)
def test_a_group_that_is_not_the_world(ranks, members):
    tokens = (5, 7, 4)[: len(members)]
    cases = [
        Case(tokens=tokens, num_experts=e, plan=plan, ranks_per_node=1)
        for e in (1, 4)
        for plan in (Plan(), Plan(pipeline_degree=3, all_to_all="2dh"), Plan(shard_degree=0))
    ]
    for case, answers in zip(cases, zip(*ranks(4).run(run_cases, cases, True, ranks=members))):
        check(case, answers)


class Scale(nn.Module):
    """A custom expert with one parameter: multiplies by it, and counts its calls."""

    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(float(value), dtype=torch.float64))

    def forward(self, rows):
        return rows * self.value


class Batched(nn.Module):
    """All experts of a rank: [E, C, M], each multiplied by its own number."""

    def __init__(self, values):
        super().__init__()
        self.values = nn.Parameter(torch.tensor(values, dtype=torch.float64).reshape(-1, 1, 1))

    def forward(self, rows_ECM):
        return rows_ECM * self.values


VALUES = [1.0, 10.0, 100.0]


def custom(group, kind, plan):
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    own = list(torch.arange(3).chunk(world)[rank].tolist()) if rank < len(torch.arange(3).chunk(world)) else []
    if kind == "all listed":
        experts = nn.ModuleList(Scale(v) for v in VALUES)
    elif kind == "own listed":
        experts = nn.ModuleList(Scale(VALUES[e]) for e in own)
    else:
        experts = Batched([VALUES[e] for e in own])
    torch.manual_seed(0)
    moe = MoE(
        4, 1, 3, gate=TopK(k=2, balance_coef=0), experts=experts, mesh=group, ranks_per_node=1, dtype=torch.float64
    )
    x = tensor(5, 4, dtype=torch.float64, seed=rank, grad=True)
    y = moe(x, plan=plan)
    y.sum().backward()
    names = [name for name, _ in moe.named_parameters() if name != "gate.weight"]
    grads = [p.grad.flatten() for name, p in moe.named_parameters() if name != "gate.weight"]
    return y.detach(), x.grad, moe.gate.weight.detach(), names, torch.cat(grads) if grads else torch.zeros(0)


@pytest.mark.parametrize("kind", ["all listed", "own listed", "batched"])
@pytest.mark.parametrize("world", [2, 4])
def test_custom_experts(ranks, kind, world):
    layout = "padded" if kind == "batched" else "ragged"
    for plan in (Plan(layout=layout), Plan(layout=layout, pipeline_degree=3, all_to_all="2dh")):
        answers = ranks(world).run(custom, kind, plan)
        values = torch.tensor(VALUES, dtype=torch.float64, requires_grad=True)
        total = 0
        for rank, (y, grad_x, gate, _, _) in enumerate(answers):
            x = tensor(5, 4, dtype=torch.float64, seed=rank, grad=True)
            chosen = (x @ gate.T).softmax(-1).topk(2, dim=-1)
            weights = chosen.values / chosen.values.sum(-1, keepdim=True)
            wanted = x * (weights * values[chosen.indices]).sum(-1, keepdim=True)
            assert_close(y, wanted)
            assert_close(grad_x, torch.autograd.grad(wanted.sum(), x, retain_graph=True)[0])
            total = total + wanted.sum()
        (wanted,) = torch.autograd.grad(total, values)
        assert_close(torch.cat([grads for *_, grads in answers]), wanted)
        if kind != "batched":
            names = [name for *_, names, _ in answers for name in names]
            assert names == [f"experts.experts.{e}.value" for e in range(3)], "as in one process"


def under_ddp(group, kind):
    """A model with an expert layer between dense ones, its experts left to itself, its rest averaged by DDP."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    torch.manual_seed(0)
    experts = nn.ModuleList(Scale(v) for v in VALUES) if kind == "custom" else "gated"
    moe = MoE(4, 8, 3, gate=TopK(k=2, balance_coef=0), experts=experts, mesh=group, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(4, 4, dtype=torch.float64), moe, nn.Linear(4, 2, dtype=torch.float64))
    own = {id(p) for p in parallel.expert_parameters(model)}
    names = [name for name, p in model.named_parameters() if id(p) in own]
    assert names == [name for name, _ in model.named_parameters() if ".experts." in name]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    wrapped = DistributedDataParallel(model, process_group=group)
    for step in range(2):
        model.zero_grad()
        x = tensor(6, 4, dtype=torch.float64, seed=10 * step + rank)
        (wrapped(x).square().sum() / world).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def single(kind, world):
    torch.manual_seed(0)
    experts = nn.ModuleList(Scale(v) for v in VALUES) if kind == "custom" else "gated"
    moe = MoE(4, 8, 3, gate=TopK(k=2, balance_coef=0), experts=experts, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(4, 4, dtype=torch.float64), moe, nn.Linear(4, 2, dtype=torch.float64))
    x = torch.cat([tensor(6, 4, dtype=torch.float64, seed=10 + rank) for rank in range(world)])
    (model(x).square().sum() / world).backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", ["built in", "custom"])
def test_under_ddp(ranks, kind):
    wanted = single(kind, 2)
    for rank, gradients in enumerate(ranks(2).run(under_ddp, kind)):
        for name, g in gradients.items():
            if ".experts." not in name:
                # DDP gives the mean over the two ranks.
                assert_close(g, wanted[name] / 2, what=name)
            elif kind == "built in":
                assert_close(g, wanted[name][:2] if rank == 0 else wanted[name][2:], what=name)
            else:
                assert_close(g, wanted[name], what=name)


class Restless:
    """Another plan on every call: the one that a recomputation must not be given."""

    same_on_all_ranks = True

    def __init__(self):
        self.plans = cycle([Plan(), Plan(layout="padded", pipeline_degree=3), Plan(shard_degree=0)])
        self.asked = 0

    def plan(self, workload):
        self.asked += 1
        return Decision(plan=next(self.plans), source="test", reason="", workload=workload)


def checkpointed(group, reentrant, kind):
    torch.manual_seed(0)
    experts = nn.ModuleList(Scale(v) for v in VALUES) if kind == "custom" else "gated"
    moe = MoE(4, 8, 3, experts=experts, mesh=group, planner=Restless(), dtype=torch.float64)
    rank = dist.get_rank(group)
    x = [tensor(6, 4, dtype=torch.float64, seed=n + 2 * rank, grad=True) for n in range(2)]
    if kind == "custom":
        moe.planner = Restless()
        moe.planner.plans = cycle([Plan(), Plan(layout="padded", pipeline_degree=3), Plan(tile_rows=8)])
    inputs = [*x, *moe.parameters()]

    def plainly(x):
        return moe(x).square().sum()

    plain = torch.autograd.grad(sum(plainly(each) for each in x), inputs)
    asked = moe.planner.asked
    for each in inputs:
        each.grad = None
    # The planner of three plans is one step further than before: bits may differ, rounding may not.
    sum(checkpoint(plainly, each, use_reentrant=reentrant) for each in x).backward()
    assert moe.planner.asked == asked + 2, "the recomputation asked the planner"
    for given, wanted in zip(inputs, plain):
        assert_close(given.grad, wanted)
    return "fine"


@pytest.mark.parametrize("kind", ["built in", "custom"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_keeps_the_plan(ranks, reentrant, kind):
    assert ranks(2).run(checkpointed, reentrant, kind) == ["fine", "fine"]


def autocast(group, plan):
    torch.manual_seed(0)
    moe = MoE(8, 16, 2, mesh=group)
    alone = MoE(8, 16, 2)
    with torch.no_grad():
        alone.gate.weight.copy_(moe.gate.weight)
    x = tensor(6, 8, grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = moe(x, plan=plan)
    y.float().sum().backward()
    return y.detach(), moe.experts.up_proj.grad, moe.experts.up_proj.dtype


def test_autocast(ranks):
    for plan in (Plan(), Plan(shard_degree=0), Plan(pipeline_degree=2)):
        answers = ranks(2).run(autocast, plan)
        torch.manual_seed(0)
        alone = MoE(8, 16, 2)
        x = tensor(6, 8, grad=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            wanted = alone(x)
        (2 * wanted.float().sum()).backward()  # two ranks with equal tokens
        for rank, (y, grad, dtype) in enumerate(answers):
            assert y.dtype == torch.bfloat16
            assert (dtype, grad.dtype) == (torch.float32, torch.float32)
            assert_close(y, wanted, torch.bfloat16)
            assert_close(grad, alone.experts.up_proj.grad[rank : rank + 1], torch.bfloat16)


def frozen(group):
    """Only rank 0 wants gradients; the others take part in its backward all the same."""
    rank = dist.get_rank(group)
    moe = MoE(4, 8, 4, mesh=group)
    moe.requires_grad_(False)
    x = tensor(5, 4, seed=rank, grad=rank == 0)
    y = moe(x)
    y.sum().backward()
    twin = copy.deepcopy(moe)
    with torch.no_grad():
        assert torch.equal(twin(x), y)
    return x.grad is not None, all(p.grad is None for p in moe.parameters())


def test_a_rank_that_needs_no_gradient_takes_part(ranks):
    assert ranks(2).run(frozen) == [(True, True), (False, True)]


def initial(group, num_experts):
    torch.manual_seed(3)
    moe = MoE(4, 6, num_experts, gate=TopK(k=1), bias=True, mesh=group)
    return {name: p.detach() for name, p in moe.named_parameters()}


@pytest.mark.parametrize("num_experts", [1, 2, 3])
def test_initial_weights_are_those_of_one_process(ranks, num_experts):
    torch.manual_seed(3)
    whole = dict(MoE(4, 6, num_experts, gate=TopK(k=1), bias=True).named_parameters())
    for parts in (ranks(world).run(initial, num_experts) for world in (2, 4)):
        for name, value in whole.items():
            pieces = [part[name] for part in parts]
            if not name.startswith("experts."):
                assert all(torch.equal(piece, value) for piece in pieces)
                continue
            slices = max(1, len(parts) // num_experts) if len(parts) % num_experts == 0 else 1
            dim = 2 if name.endswith("down_proj") else 1
            experts = [torch.cat(pieces[i : i + slices], dim=dim) for i in range(0, len(pieces), slices)]
            assert torch.equal(torch.cat(experts), value), name
