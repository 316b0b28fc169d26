"""Every plan over gloo against one process in plain torch: outputs, all gradients, equal bits when repeated."""

import itertools
from dataclasses import replace

import pytest
import torch

from tests.comm.cases import Case, check, run_cases
from tutelx import Plan
from tutelx.comm import pipeline
from tutelx.comm.placement import Placement

TOKENS = {1: (9,), 2: (5, 8), 4: (5, 7, 0, 9)}
KINDS = [
    {"layout": "ragged"},
    {"layout": "padded", "expert_kernel": "bmm"},
    {"layout": "ragged", "tile_rows": 2, "tile_columns": 3},
    {"layout": "padded"},
]
# What else varies, taken in turns, so that every value meets many plans.
TURNS = [
    {"experts": "gated", "bias": True},
    {"experts": "ffn", "bias": True, "capacity": 0.75},
    {"experts": "gated", "bias": False},
    {"experts": "ffn", "bias": False, "capacity": 1.5, "hidden_dim": 6},
    {"experts": "gated", "bias": True, "hidden_dim": 3, "capacity": 1.0},
]


def plans(degrees: tuple[int, ...]) -> list[Plan]:
    """Every shard degree with every pipeline degree, in every kind of layout and kernel."""
    chunked = itertools.product(degrees, (1, 2, 4, 8), KINDS)
    # With all weights gathered nothing travels that could be cut into chunks.
    return [Plan(shard_degree=r, pipeline_degree=d, **kind) for r, d, kind in chunked if r > 0 or d == 1]


def cases(world: int, num_experts: int) -> list[Case]:
    degrees = Placement(num_experts=num_experts, hidden_dim=8, world=world).degrees()
    tried = list(itertools.product(plans(degrees), (torch.float64, torch.float32)))
    turns = itertools.islice(itertools.cycle(TURNS), num_experts, None)
    return [
        Case(tokens=TOKENS[world], num_experts=num_experts, plan=plan, dtype=dtype, **turn)
        for (plan, dtype), turn in zip(tried, turns)
    ]


def hierarchical(linear: list[Case], world: int) -> list[Case]:
    """The same on nodes of every size, of four ranks mostly as two nodes of two."""
    sizes = [m for m in (1, 2, 4) if m <= world]
    if world == 4:
        sizes = [1, 2, 2, 2, 2, 4, 2, 2, 2, 2]
    return [
        replace(case, plan=replace(case.plan, all_to_all="2dh"), ranks_per_node=m)
        for case, m in zip(linear, itertools.cycle(sizes))
    ]


def coordinates(tried: list[Case]) -> set[tuple[int, int, str, str]]:
    plans = [case.plan for case in tried]
    return {(plan.shard_degree, plan.pipeline_degree, plan.layout, plan.all_to_all) for plan in plans}


@pytest.mark.parametrize("num_experts", [1, 2, 4, 6, 8])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_cases_are_all_there_are(world, num_experts):
    linear = cases(world, num_experts)
    tokens_travel = [case for case in linear if case.plan.shard_degree > 0]
    twins = hierarchical(tokens_travel, world)
    slices = max(1, world // num_experts)
    degrees = [r for r in range(1, slices + 1) if slices % r == 0]
    crossed = set(itertools.product(degrees, (1, 2, 4, 8), ("ragged", "padded"), ("linear", "2dh")))
    gathered = {(0, 1, "ragged", "linear"), (0, 1, "padded", "linear")}
    assert coordinates(linear + twins) == crossed | gathered
    for dtype in (torch.float64, torch.float32):
        assert coordinates([case for case in linear + twins if case.dtype == dtype]) == crossed | gathered
    if world == 4:
        two_by_two = [case for case in twins if case.ranks_per_node == 2]
        assert coordinates(two_by_two) == {each for each in crossed if each[3] == "2dh"}
        others = {(case.ranks_per_node, case.plan.layout) for case in twins}
        assert others == set(itertools.product((1, 2, 4), ("ragged", "padded")))


@pytest.mark.parametrize("num_experts", [1, 2, 4, 6, 8])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_plan(ranks, world, num_experts):
    linear = cases(world, num_experts)
    answers = ranks(world).run(run_cases, linear, True)
    for n, case in enumerate(linear):
        check(case, [answer[n] for answer in answers])
    # The hierarchical exchange gives the bits of the linear one, on nodes of one, two and, where there are, more ranks.
    pairs = [(n, case) for n, case in enumerate(linear) if case.plan.shard_degree > 0]
    twins = hierarchical([case for _, case in pairs], world)
    others = ranks(world).run(run_cases, twins)
    for rank, (given, wanted) in enumerate(zip(others, answers)):
        for (n, _), answer, twin in zip(pairs, given, twins):
            m = twin.ranks_per_node
            assert answer.exchange == f"2dh over {world // m} nodes of {m} ranks (given)"
            assert torch.equal(answer.y, wanted[n].y), (rank, twin)
            assert torch.equal(answer.grad_x, wanted[n].grad_x), (rank, twin)
            for name, gradient in answer.gradients.items():
                assert torch.equal(gradient, wanted[n].gradients[name]), (rank, name, twin)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(ranks, dtype):
    # Both of two experts: rounding cannot change the choice.
    plans = [Plan(), Plan(shard_degree=2, pipeline_degree=2), Plan(shard_degree=0), Plan(all_to_all="2dh")]
    low = [Case(tokens=(5, 7, 0, 9), num_experts=2, plan=plan, dtype=dtype, ranks_per_node=2) for plan in plans]
    for case, answers in zip(low, zip(*ranks(4).run(run_cases, low))):
        check(case, answers)


def products_of_torch(group, cases):
    """As on a device for which the tiles are not compiled."""
    pipeline._kernel, before = (lambda plan, device: "each"), pipeline._kernel
    try:
        return run_cases(group, cases)
    finally:
        pipeline._kernel = before


def test_a_product_for_each_expert(ranks):
    tried = [
        Case(tokens=(5, 8), num_experts=e, plan=plan, experts=experts, bias=bias)
        for e in (1, 4)
        for plan in (Plan(), Plan(pipeline_degree=2, layout="padded"), Plan(shard_degree=0))
        for experts, bias in (("gated", True), ("gated", False), ("ffn", True), ("ffn", False))
    ]
    for case, answers in zip(tried, zip(*ranks(2).run(products_of_torch, tried))):
        check(case, answers)
