"""Records of a real layer on a clock that is made up: what is timed, what is refused, what is written down."""

import logging
import math
from dataclasses import dataclass, field, replace

import pytest
import torch
import torch.distributed as dist

from tests.tuner.machines import HARDWARE, machine
from tutelx.errors import InvalidValueError
from tutelx.planner import RulePlanner
from tutelx.tuner import measure_key
from tutelx.tuner.cases import Case, Subject
from tutelx.tuner.grid import World, workload
from tutelx.tuner.machine import Machine
from tutelx.tuner.measure import MOST_REPEATS, Interrupted, Options, measure
from tutelx.tuner.provenance import command_line
from tutelx.tuner.shapes import Shape
from tutelx.tuning.key import Key
from tutelx.tuning.records import StoredPlan
from tutelx.types import Plan

SHAPE = Shape(model_dim=8, hidden_dim=16, num_experts=4)
WORK = workload(SHAPE, World(threads=torch.get_num_threads()), 24, 2, 1.5, training=True)
DEFAULT = RulePlanner().plan(WORK).plan
PADDED, BMM = Plan(layout="padded"), Plan(layout="padded", expert_kernel="bmm")


@dataclass(frozen=True, kw_only=True)
class Told(Machine):
    """Runs each call, and says that it took so long: by plan, in seconds."""

    times: dict = field(default_factory=dict)
    hot: list = field(default_factory=list)
    ran: list = field(default_factory=list)

    def timed(self, call):
        call()
        self.ran.append(RAN[-1])
        return self.times.get(RAN[-1], 1.0)

    @property
    def timed_plans(self):
        """Those that ran more than once."""
        return {plan for plan in self.ran if self.ran.count(plan) > 1}

    def throttling(self):
        return frozenset({"power brake"}) if self.hot and self.hot.pop(0) else None


RAN: list[Plan] = []


@pytest.fixture(autouse=True)
def _seen(monkeypatch):
    call = Case.call

    def noted(self, plan=None):
        RAN.append(plan)
        return call(self, plan)

    monkeypatch.setattr(Case, "call", noted)


def told(times=(), **more):
    return machine(Told, times=dict(times), **more)


def test_a_record_by_hand():
    fake = told({DEFAULT: 2.0, PADDED: 1.0, BMM: 2.2})
    record = measure_key(WORK, [PADDED, BMM], machine=fake, seconds=1e-3, command="tutelx tune a")
    assert record.key == Key.of(WORK)
    assert record.hardware == HARDWARE
    assert record.default == StoredPlan(layout="ragged", expert_kernel="tiled")
    assert [str(each.plan.plan(DEFAULT)) for each in record.candidates] == [str(p) for p in (DEFAULT, PADDED, BMM)]
    assert [(c.median, c.ratio) for c in record.candidates] == [(2.0, 1.0), (1.0, 0.5), (2.2, 1.1)]
    assert {(c.spread, c.iqr) for c in record.candidates} == {(0.0, 0.0)}
    assert all(c.error <= 1e-5 for c in record.candidates)
    # 1.1 in two turns is hopeless beside 0.5.
    assert [(c.n, c.status) for c in record.candidates] == [(5, "ok"), (5, "ok"), (2, "slow")]
    assert record.best.plan == StoredPlan.of(PADDED)
    assert record.provenance["command"] == "tutelx tune a"
    assert record.provenance["samples"] == "12"
    assert record.provenance["date"].endswith("+00:00")
    assert set(record.software) == {"tutelx", "torch", "python"}


def test_a_key_is_measured_at_its_least_and_inference_has_no_gradients():
    key = Key.of(replace(WORK, tokens=27, demand=21))
    record = measure_key(key, [PADDED], machine=told(), seconds=1e-3, training=False)
    assert record.key == replace(key, training=False)
    assert record.key.tokens == 24


def fast_and_wrong(monkeypatch, plan, spoil):
    """The layer is fast with this plan, and what it gives is spoilt."""
    call = Case.call

    def spoilt(self, given=None):
        y = call(self, given)
        return spoil(self, y) if given == plan else y

    monkeypatch.setattr(Case, "call", spoilt)


def no_output(case, y):
    return torch.zeros_like(y)


def one_token(case, y):
    y[3] *= 1.01
    return y


def one_gradient(case, y):
    case.subject.layer.experts.down_proj.grad[2, 1, 5] += 1.0
    return y


def not_a_number(case, y):
    case.inputs.x_TM.grad[0, 0] = float("nan")
    return y


@pytest.mark.parametrize("spoil", [no_output, one_token, one_gradient, not_a_number])
def test_a_plan_that_is_fast_and_wrong_is_never_chosen(monkeypatch, caplog, spoil):
    fast_and_wrong(monkeypatch, PADDED, spoil)
    fake = told({DEFAULT: 1.0, PADDED: 0.01, BMM: 0.9})
    with caplog.at_level(logging.WARNING, "tutelx"):
        record = measure_key(WORK, [PADDED, BMM], machine=fake, seconds=1e-3)
    [wrong] = [each for each in record.candidates if each.status == "wrong"]
    assert (wrong.plan, wrong.n) == (StoredPlan.of(PADDED), 0)
    if spoil is not_a_number:
        assert wrong.error is None
    else:
        assert wrong.error > 1e-3
    assert PADDED not in fake.timed_plans
    assert record.best.plan == StoredPlan.of(BMM)
    assert "is wrong for" in caplog.text


def test_a_wrong_default_is_said_and_kept(monkeypatch, caplog):
    fast_and_wrong(monkeypatch, DEFAULT, no_output)
    with caplog.at_level(logging.WARNING, "tutelx"):
        record = measure_key(WORK, [PADDED], machine=told(), seconds=1e-3)
    # What agrees with plain torch disagrees with the default: neither is trusted.
    assert [c.status for c in record.candidates] == ["wrong", "wrong"]
    assert record.best.plan == record.default
    assert f"{DEFAULT} is wrong for" in caplog.text


def test_a_plan_that_fails_is_left_out_and_the_default_may_not(monkeypatch, caplog):
    def fails(case, y):
        raise RuntimeError("out of memory")

    fast_and_wrong(monkeypatch, PADDED, fails)
    record = measure_key(WORK, [PADDED, BMM], machine=told(), seconds=1e-3)
    [failed] = [c for c in record.candidates if c.status == "wrong"]
    assert (failed.plan, failed.error, failed.n) == (StoredPlan.of(PADDED), None, 0)
    assert "cannot run" in caplog.text
    fast_and_wrong(monkeypatch, DEFAULT, fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        measure_key(WORK, [PADDED], machine=told(), seconds=1e-3)


def test_a_throttled_turn_is_discarded_and_repeated():
    # Looked at before and behind each turn; the second turn is throttled behind, the third before.
    fake = told(hot=[0, 0, 0, 1, 1, 0])
    record = measure_key(WORK, [PADDED], machine=fake, seconds=1e-3)
    assert [c.n for c in record.candidates] == [5, 5]
    assert (record.provenance["discarded"], record.provenance["throttled"]) == ("2 turns", "power brake")
    with pytest.raises(InvalidValueError, match=rf"throttled in {MOST_REPEATS + 1} turns in a row \(power brake\)"):
        measure_key(WORK, [PADDED], machine=told(hot=[1] * 100), seconds=1e-3)


def test_an_interrupt_stops_between_two_calls():
    asked = []

    def stop():
        asked.append(1)
        return len(asked) == 4

    subject = Subject(shape=SHAPE, group=None, ranks_per_node=None, device=torch.device("cpu"), seed=0)
    with pytest.raises(Interrupted):
        measure(subject, WORK, [PADDED, BMM], told(), Options(stop=stop))
    assert len(asked) == 4


@pytest.mark.parametrize(
    ("what", "plans", "message"),
    [
        (WORK, [Plan(pipeline_degree=2)], "ragged/256x1024/d2 cannot run"),
        (replace(WORK, world=2), None, "world=2 of the workload, but the group has 1 ranks"),
        (
            replace(WORK, expert_numbers=5),
            None,
            "expert_numbers=5 with model_dim=8, hidden_dim=16 are the parameters of",
        ),
        (replace(Key.of(WORK), top_k=9), None, "top_k=9"),
    ],
)
def test_what_cannot_be_measured(what, plans, message):
    with pytest.raises(InvalidValueError, match=message):
        measure_key(what, plans, machine=told(), seconds=1e-3)


def test_threads_are_set_back():
    before = torch.get_num_threads()
    record = measure_key(replace(WORK, threads=before + 1), [], machine=told(), seconds=1e-3)
    assert record.key.threads == before + 1
    assert torch.get_num_threads() == before


def test_a_command_says_nothing_of_the_machine():
    assert (
        command_line(["tune", "--db", "/home/somebody/db", "--tokens", "1..8"]) == "tutelx tune --db db --tokens 1..8"
    )


def over_ranks(group, fail):
    """Rank 1 is the slow one, and alone finds one plan wrong."""
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    work = workload(SHAPE, World(threads=1, world=world), 12, 2, 1.5, training=True)
    plain, gathered, chunks = (
        Plan(tile_rows=64),
        Plan(shard_degree=0, tile_rows=64),
        Plan(pipeline_degree=2, tile_rows=64),
    )
    call = Case.call

    def noted(self, plan=None):
        RAN.append(plan)
        y = call(self, plan)
        return y * 2 if plan == chunks and rank == 1 and fail == "wrong" else y

    Case.call = noted
    try:
        fake = told({plain: 1.0, gathered: 0.5 + 0.3 * rank, chunks: 0.1 + rank}, hot=[0, rank, 0])
        record = measure_key(work, [plain, gathered, chunks], group=group, machine=fake, seconds=1e-3, command="c")
    finally:
        Case.call = call
    return record


@pytest.mark.parametrize("fail", ["", "wrong"])
def test_ranks_agree_and_the_slowest_counts(ranks, fail):
    one, other = ranks(4).run(over_ranks, fail, ranks=(0, 1))
    assert one.candidates == other.candidates
    assert one.key.world == 2
    found = {(c.plan.shard_degree, c.plan.pipeline_degree): c for c in one.candidates}
    assert found[0, 1].median == pytest.approx(0.8)
    if fail:
        assert (found[1, 2].status, found[1, 2].n) == ("wrong", 0)
        assert math.isclose(found[1, 2].error, 1.0, rel_tol=0.5)
    else:
        assert found[1, 2].median == pytest.approx(1.1)
    assert one.provenance["discarded"] == other.provenance["discarded"] == "1 turns"
    assert one.best.plan.shard_degree == 0
