"""The timing core, with a clock that says what each call takes."""

import pytest
import torch

from tutelx.bench.timing import LEAST_SAMPLES, MOST_CALLS, MOST_ROUNDS, Contender, CudaClock, Stats, in_turns


class Laboratory:
    """Contenders that write down their calls, and a clock that charges each what it is set to cost."""

    def __init__(self, **costs: float) -> None:
        self.costs = costs
        self.log: list[tuple[str, object]] = []
        self.measured = 0.0

    def contender(self, name: str, inputs: list, always: bool = False) -> Contender:
        return Contender(name, lambda given: self.log.append((name, given)), inputs, always=always)

    def clock(self, calls) -> float:
        begin = len(self.log)
        for call in calls:
            call()
        took = sum(self.costs[name] for name, _ in self.log[begin:])
        self.measured += took
        return took


def names(log) -> list[str]:
    return [name for name, _ in log]


def test_contenders_take_turns():
    laboratory, inputs = Laboratory(a=1.0, b=1.0), [0]
    in_turns([laboratory.contender(name, inputs) for name in "ab"], laboratory.clock, 6.0)
    # two calls each to warm up, then rounds
    assert names(laboratory.log) == ["a", "a", "b", "b", *["a", "b"] * 3]


def test_equal_contenders_never_sit_out():
    laboratory = Laboratory(a=1.0, b=1.2, c=0.9)
    contenders = [laboratory.contender(name, [0]) for name in "abc"]
    in_turns(contenders, laboratory.clock, 60.0)
    assert len({len(one.samples) for one in contenders}) == 1


def test_inputs_rotate_and_no_two_calls_in_a_row_share_one():
    laboratory, inputs = Laboratory(a=1.0, b=1.0), [0, 1, 2]
    in_turns([laboratory.contender(name, inputs) for name in "ab"], laboratory.clock, 10.0)
    given = [each for _, each in laboratory.log]
    assert given == [i % 3 for i in range(len(given))]


def test_own_inputs_rotate_on_their_own():
    laboratory = Laboratory(a=1.0, b=1.0)
    shared, own = [0, 1], ["x", "y", "z"]
    in_turns([laboratory.contender("a", shared), laboratory.contender("b", own)], laboratory.clock, 6.0)
    assert [each for name, each in laboratory.log if name == "b"] == ["x", "y", "z", "x", "y"]
    assert [each for name, each in laboratory.log if name == "a"] == [0, 1, 0, 1, 0]


def test_the_budget_ends_it():
    laboratory = Laboratory(a=1.0)
    (a,) = [laboratory.contender("a", [0])]
    in_turns([a], laboratory.clock, 20.0)
    assert len(a.samples) == 20
    assert laboratory.measured == 20 + 2


def test_what_always_runs_gets_its_least_samples_and_the_others_one():
    laboratory = Laboratory(ours=100.0, copy=100.0, slow=5000.0)
    contenders = [laboratory.contender(name, [0], always=name != "slow") for name in ("ours", "copy", "slow")]
    in_turns(contenders, laboratory.clock, 1.0)
    assert [len(one.samples) for one in contenders] == [LEAST_SAMPLES, LEAST_SAMPLES, 1]
    # a first call that outlasts the budget is not repeated to warm up
    assert names(laboratory.log)[:3] == ["ours", "copy", "slow"]


def test_a_slow_contender_sits_out_until_the_others_caught_up():
    laboratory = Laboratory(ours=1.0, slow=50.0)
    ours, slow = laboratory.contender("ours", [0], always=True), laboratory.contender("slow", [0])
    in_turns([ours, slow], laboratory.clock, 1000.0)
    assert sum(slow.samples) == pytest.approx(0.75 * 1000, rel=0.1)
    assert len(ours.samples) >= 200
    rounds = "".join(name[0] for name in names(laboratory.log)[4:])
    assert "ss" not in rounds
    assert rounds.count("s") == len(slow.samples)


def test_what_always_runs_is_paired_round_by_round():
    laboratory = Laboratory(ours=1.0, copy=30.0, plain=3.0)
    contenders = [laboratory.contender(name, [0], always=name != "plain") for name in ("ours", "copy", "plain")]
    in_turns(contenders, laboratory.clock, 500.0)
    assert len(contenders[0].samples) == len(contenders[1].samples)


def test_short_calls_are_timed_several_at_a_time():
    laboratory = Laboratory(short=20e-6, tiny=1e-9, long=1.0)
    contenders = [laboratory.contender(name, [0]) for name in ("short", "tiny", "long")]
    in_turns(contenders, laboratory.clock, 0.5)
    assert [one.calls for one in contenders] == [10, MOST_CALLS, 1]
    assert contenders[0].samples[0] == pytest.approx(20e-6)


def test_stats_by_hand():
    stats = Stats.of([4.0, 1.0, 3.0, 2.0, 100.0], calls=2)
    assert (stats.q1, stats.median, stats.q3, stats.iqr) == (2.0, 3.0, 4.0, 2.0)
    assert (stats.n, stats.calls_per_sample) == (5, 2)
    assert Stats.of([7.0], calls=1).iqr == 0


def test_rounds_end_where_samples_are_short():
    laboratory = Laboratory(a=1e-3)
    a = laboratory.contender("a", [0])
    in_turns([a], laboratory.clock, 100.0)
    assert len(a.samples) == MOST_ROUNDS


def test_a_device_clock_keeps_outputs_up_to_a_size():
    clock = CudaClock(keep=100)
    for _ in range(3):
        clock.hold((torch.zeros(5), torch.zeros(5)))  # 40 bytes
    assert [size for size, _ in clock._outputs] == [40, 40]
    clock.hold(torch.zeros(30))  # 120 bytes are more than it may keep
    assert (len(clock._outputs), clock._bytes) == (0, 0)
