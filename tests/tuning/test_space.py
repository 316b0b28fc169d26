"""The plans of a workload, listed by hand."""

import itertools
from dataclasses import replace

import pytest

from tutelx.errors import InvalidValueError
from tutelx.planner import RulePlanner
from tutelx.tuning.cost import Cost
from tutelx.tuning.space import is_legal, legal_plans, order, prune
from tutelx.types import Plan, Workload

HERE = Workload(
    tokens=1024,
    top_k=2,
    num_experts=8,
    model_dim=512,
    hidden_dim=512,
    demand=512,
    capacity=None,
    dtype="float32",
    device="cpu",
    training=True,
    threads=2,
    expert_kernels=("tiled", "bmm", "grouped"),
)
ACROSS = replace(
    HERE, expert_kernels=("tiled", "bmm"), shard_degrees=(0, 1), all_to_alls=("linear",), world=2, expert_numbers=1000
)
DEFAULT = Plan(tile_rows=512, tile_columns=1024)


def names(plans):
    return [str(plan) for plan in plans]


def test_one_process_by_hand():
    # The fullest expert has 512 rows, of 512 columns at most: tiles of 512 or 1024 rows are one, as are columns.
    assert names(legal_plans(HERE, default=DEFAULT)) == [
        "ragged/512x1024",
        "ragged/64x256",
        "ragged/64x1024",
        "ragged/256x256",
        "ragged/256x1024",
        "ragged/512x256",
        "ragged/grouped",
        "padded/512x1024",
        "padded/bmm",
    ]


def test_one_process_exhaustive():
    plans = legal_plans(HERE, default=DEFAULT, exhaustive=True)
    # 32, 64, 128, 256, 512 rows times 128, 256, 1024 columns (512 and 2048 cut nothing either), in two layouts.
    tiled = {(p.layout, p.tile_rows, p.tile_columns) for p in plans if p.expert_kernel == "tiled"}
    layouts = ("ragged", "padded")
    assert tiled == set(itertools.product(layouts, (32, 64, 128, 256, 512), (128, 256, 1024)))
    assert names(p for p in plans if p.expert_kernel != "tiled") == ["ragged/grouped", "padded/bmm", "padded/grouped"]
    assert plans[0] == DEFAULT
    assert len(set(plans)) == len(plans) == 33


def test_over_ranks_by_hand():
    # No rows travel at degree 0; two local kinds of each.
    default = replace(DEFAULT, shard_degree=1)
    assert names(legal_plans(ACROSS, default=default)) == [
        "ragged/512x1024",
        "ragged/512x256/r0",
        "ragged/512x1024/r0",
        "ragged/512x256",
        "ragged/512x256/d2",
        "ragged/512x1024/d2",
        "ragged/512x256/d4",
        "ragged/512x1024/d4",
        "ragged/512x256/d8",
        "ragged/512x1024/d8",
    ]


@pytest.mark.parametrize(
    ("world", "per_node", "exhaustive", "two_step"),
    [(4, 2, False, True), (4, 4, False, False), (4, 1, False, False), (4, 4, True, True), (4, None, True, False)],
)
def test_two_steps_where_both_have_somebody_to_send_to(world, per_node, exhaustive, two_step):
    ways = ("linear",) if per_node is None else ("linear", "2dh")
    work = replace(ACROSS, world=world, ranks_per_node=per_node, all_to_alls=ways, shard_degrees=(0, 1, 2))
    plans = legal_plans(work, default=DEFAULT, exhaustive=exhaustive)
    assert any(plan.all_to_all == "2dh" for plan in plans) == two_step
    gathered = [plan for plan in plans if plan.shard_degree == 0]
    assert {(plan.pipeline_degree, plan.all_to_all) for plan in gathered} == {(1, "linear")}
    assert {plan.pipeline_degree for plan in plans if plan.shard_degree == 2} == {1, 2, 4, 8}
    kinds = {(p.layout, p.expert_kernel, p.tile_rows, p.tile_columns) for p in plans}
    # Exhaustive: the eight kinds of one process without grouped products.
    assert len(kinds) == (8 if exhaustive else 2)
    assert len(plans) == len(kinds) * (1 + 2 * 4 * (1 + two_step))


@pytest.mark.parametrize(
    "work",
    [
        HERE,
        ACROSS,
        replace(HERE, layouts=("ragged",)),
        replace(HERE, tokens=0, demand=0),
        replace(HERE, device="cuda", demand=None),
    ],
)
@pytest.mark.parametrize("exhaustive", [False, True])
def test_every_plan_is_legal_in_order_and_there_once(work, exhaustive):
    default = RulePlanner().plan(work).plan
    plans = legal_plans(work, default=default, exhaustive=exhaustive)
    assert plans[0] == default
    assert all(is_legal(plan, work) for plan in plans)
    assert len(set(plans)) == len(plans)
    assert plans[1:] == sorted(plans[1:], key=order)


def test_an_accelerator_has_no_tiles():
    work = replace(HERE, device="cuda", demand=None)
    assert names(legal_plans(work, default=Plan(expert_kernel="grouped"))) == [
        "ragged/grouped", "ragged/256x1024", "padded/256x1024", "padded/bmm"
    ]  # fmt: skip


def test_a_default_that_cannot_run():
    with pytest.raises(InvalidValueError, match="default=ragged/256x1024/r3 is no plan for"):
        legal_plans(ACROSS, default=Plan(shard_degree=3))


class Told:
    """A cost model with these answers."""

    def __init__(self, *totals):
        self.totals = dict(zip(legal_plans(HERE, default=DEFAULT), totals))

    def predict(self, workload, plan):
        return Cost(total=self.totals[plan], compute=0, exchange=0, weights=0, memory=0)


def test_prune_by_hand():
    plans = legal_plans(HERE, default=DEFAULT)
    nan = float("nan")
    # The best is 2: up to 4 stays with the margin of 2, what is not predicted stays, and so does the default.
    model = Told(9.0, 2.0, 4.0, 4.1, nan, 3.0, 8.0, float("inf"), 2.5)
    assert names(prune(plans, HERE, model, 2.0)) == names(plans[i] for i in (0, 1, 2, 4, 5, 7, 8))
    assert names(prune(plans, HERE, model, 1.0)) == names(plans[i] for i in (0, 1, 4, 7))
    with pytest.raises(InvalidValueError, match=r"margin=0\.9 must be at least 1"):
        prune(plans, HERE, model, 0.9)
