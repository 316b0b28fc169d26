"""Searches over a grid: what is skipped, what is kept, when it ends. The store and the clock are made up."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from tests.tuner.machines import machine
from tutelx.errors import InvalidValueError, RankFailedError
from tutelx.tuner import search as searching
from tutelx.tuner.cases import Case
from tutelx.tuner.grid import Grid, World
from tutelx.tuner.measure import Options
from tutelx.tuner.search import Search, search, world_here
from tutelx.tuner.shapes import Shape
from tutelx.tuning.cost import Cost
from tutelx.tuning.key import Key
from tutelx.tuning.space import legal_plans

SHAPES = [Shape(model_dim=8, hidden_dim=16, num_experts=4), Shape(model_dim=4, hidden_dim=8, num_experts=2)]
QUICK = Options(seconds=1e-3)


class Memory:
    """Keeps records by key."""

    def __init__(self):
        self.records = {}

    @classmethod
    def of(cls, other):
        found = cls()
        found.records = dict(other.records)
        return found

    def known(self, key, machine):
        return self.records.get(key)

    def add(self, record):
        self.records[record.key] = record


def grid(tokens=(8, 16), shapes=SHAPES, **world):
    here = World(threads=torch.get_num_threads(), **world)
    return Grid(tokens=tokens, top_k=(1,), load_factors=(1.0,)).workloads(shapes, here)


def what(**more):
    return Search(**{"workloads": grid(), "options": QUICK, **more})


def test_a_second_run_skips_what_is_known():
    store, seen, told = Memory(), [], []
    first = search(what(), store, machine(), before=seen.append, after=lambda record, new: told.append(new))
    assert (first.measured, len(first.records), first.left, first.complete) == (4, 4, 0, True)
    assert seen == grid()
    assert [record.key for record in first.records] == [Key.of(work) for work in grid()] == list(store.records)
    second = search(what(), store, machine(), after=lambda record, new: told.append(new))
    assert (second.measured, second.records) == (0, first.records)
    assert told == [True] * 4 + [False] * 4
    # More candidates than were timed: measured again.
    third = search(what(exhaustive=True), store, machine())
    assert third.measured == 4
    assert all(len(record.candidates) > len(store_record.candidates) for record, store_record in
               zip(third.records, first.records))  # fmt: skip


class Worse:
    """Predicts ten times the time for all but the first plan and the last one."""

    def predict(self, workload, plan):
        plans = legal_plans(workload, default=self.default(workload))
        return Cost(total=1.0 if plan in (plans[0], plans[-1]) else 10.0, compute=0, exchange=0, weights=0, memory=0)

    @staticmethod
    def default(workload):
        from tutelx.planner import RulePlanner

        return RulePlanner().plan(workload).plan


def test_the_cost_model_prunes_unless_everything_is_wanted():
    works = grid(tokens=(8,), shapes=SHAPES[:1])
    pruned = search(what(workloads=works, cost_model=Worse(), margin=2.0), Memory(), machine())
    assert len(pruned.records[0].candidates) == 2
    wide = search(what(workloads=works, cost_model=Worse(), margin=10.0), Memory(), machine())
    plans = legal_plans(works[0], default=Worse.default(works[0]))
    assert len(wide.records[0].candidates) == len(plans) > 2
    every = search(what(workloads=works, cost_model=Worse(), exhaustive=True), Memory(), machine())
    assert len(every.records[0].candidates) > len(plans)


def test_what_was_pruned_is_not_missed_later_unless_more_is_asked():
    works, store = grid(tokens=(8,), shapes=SHAPES[:1]), Memory()
    pruned = search(what(workloads=works, cost_model=Worse(), margin=2.0), store, machine())
    assert pruned.records[0].provenance["margin"] == "2"

    def again(**more):
        return search(what(workloads=works, **more), Memory.of(store), machine()).measured

    # A model that has learnt meanwhile would keep other plans; a wider margin, or none, asks for more.
    assert again(cost_model=OfRank(0), margin=2.0) == again(cost_model=OfRank(0), margin=1.5) == 0
    assert again(cost_model=OfRank(0), margin=3.0) == again(cost_model=None) == again(exhaustive=True) == 1
    [record] = store.records.values()
    for margin in ("x", "nan"):
        store.records[record.key] = replace(record, provenance={**record.provenance, "margin": margin})
        assert again(cost_model=OfRank(0), margin=2.0) == 1


def test_a_budget_ends_it_and_the_next_run_goes_on(monkeypatch):
    times = iter([0.0, 5.0, 10.0, 12.0])
    monkeypatch.setattr(searching, "Clock", lambda together: SimpleNamespace(elapsed=lambda: next(times)))
    store = Memory()
    # Asked at 0 and 5 of 10 seconds: two are measured, two are left.
    found = search(what(budget=10.0), store, machine())
    assert (found.measured, found.left, found.complete, found.interrupted) == (2, 2, False, False)
    monkeypatch.undo()
    again = search(what(budget=1e9), store, machine())
    assert (again.measured, len(again.records), again.complete) == (2, 4, True)


def test_an_interrupt_keeps_what_was_measured():
    store = Memory()
    stop = lambda: len(store.records) == 2  # noqa: E731
    found = search(what(options=Options(seconds=1e-3, stop=stop)), store, machine())
    assert (found.measured, found.left, found.interrupted) == (2, 2, True)
    assert len(store.records) == 2


def test_what_does_not_fit_is_named_and_the_rest_is_measured(monkeypatch):
    hear = Case.hear

    def small(self):
        if self.workload.tokens == 16:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory\nmore")
        return hear(self)

    monkeypatch.setattr(Case, "hear", small)
    found = search(what(), Memory(), machine())
    assert found.measured == 2
    assert {key.tokens: why for key, why in found.failed.items()} == {16: "DefaultCPUAllocator: can't allocate memory"}
    assert len(found.failed) == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"workloads": []}, "there is nothing to tune"),
        ({"margin": 0.5}, "margin=0.5 must be at least 1"),
        ({"budget": 0.0}, "budget=0.0 must be positive"),
    ],
)
def test_searches_that_are_none(more, message):
    with pytest.raises(InvalidValueError, match=message):
        what(**more)


@pytest.mark.parametrize("options", [{"seconds": 0.0}, {"seconds": float("inf")}, {"seed": -1}])
def test_options_that_are_none(options):
    with pytest.raises(InvalidValueError):
        Options(**options)


class OfRank(Worse):
    """Rank 1's knows other rates: all that it would leave out, rank 0's keeps."""

    def __init__(self, rank):
        self.rank = rank

    def predict(self, workload, plan):
        found = super().predict(workload, plan)
        return found if self.rank else Cost(total=1.0, compute=0, exchange=0, weights=0, memory=0)


def over_ranks(group, stop_at):
    rank, store = dist.get_rank(group), Memory()
    here = world_here(torch.device("cpu"), group)
    works = Grid(tokens=(8, 16), top_k=(1,), load_factors=(1.0,)).workloads(SHAPES[1:], here)
    # Only rank 1 is interrupted, and only rank 0 knows anything.
    measured = []
    options = Options(seconds=1e-3, stop=lambda: rank == 1 and len(measured) == stop_at)
    given = Search(workloads=works, options=options, cost_model=OfRank(rank))
    first = search(given, store, machine(), group=group, after=lambda record, new: measured.append(new))
    second = search(given, store, machine(), group=group)
    return len(store.records), first.measured, second.measured, first.left, first.interrupted, second.complete, here


def test_ranks_do_the_same_and_only_the_first_keeps(ranks):
    one, other = ranks(4).run(over_ranks, 9, ranks=(0, 1))
    assert one[:6] == (2, 2, 0, 0, False, True)
    assert other[:6] == (0, 2, 0, 0, False, True)
    assert one[6] == other[6] == World(threads=1, world=2)


def test_one_rank_is_interrupted_and_all_stop(ranks):
    one, other = ranks(4).run(over_ranks, 1, ranks=(0, 1))
    assert one[1] == other[1] == 1
    assert one[4] is other[4] is True


def dies(group):
    import os

    hear = Case.hear

    def gone(self):
        if dist.get_rank(group) == 1:
            os._exit(3)
        return hear(self)

    Case.hear = gone
    works = Grid(tokens=(8,), top_k=(1,), load_factors=(1.0,)).workloads(
        SHAPES[1:], world_here(torch.device("cpu"), group)
    )
    with pytest.raises(RankFailedError, match="rank 1 did not take part"):
        search(Search(workloads=works, options=QUICK), Memory(), machine(), group=group)
    return "named"


def test_a_rank_that_dies_is_named():
    from tests.ranks import Ranks

    assert Ranks(2).run(dies, dying=(1,)) == ["named", None]
