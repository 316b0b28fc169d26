"""Exploration with times made up: nothing waits, and every expected number is worked out by hand."""

import pytest

from tests.scheduler.cases import BMM, DEFAULT, SMALL
from tutelx.errors import InvalidValueError
from tutelx.scheduler.explore import LONGEST_TURN, Exploration, Exploring, Watch

PLANS = [DEFAULT, BMM, SMALL]


def run(exploration, cost, *, calls=1, reduce=list):
    """Steps of `calls` forwards and a backward until all is tried; the plans in their order."""
    tried = []
    while True:
        turns = []
        for _ in range(calls):
            turn = exploration.ask(trains=True, reduce=reduce)
            if turn is None:
                return tried
            turns.append(turn)
        assert len({id(turn) for turn in turns}) == 1, "a plan changes between steps only"
        tried.append(turns[0].plan)
        for turn in turns:
            turn.observe(None)
        for turn in turns:
            seconds = cost(turn.plan, len(tried))
            if seconds is not None:
                turn.observe(seconds)


def test_every_plan_has_its_turn_in_every_round():
    tried = run(Exploration(PLANS, Exploring(rounds=2, warmup=1, lost=100.0)), lambda plan, step: 1.0, calls=3)
    assert len(tried) == 9
    for begin in (0, 3, 6):
        assert set(tried[begin : begin + 3]) == set(PLANS)


def test_the_fastest_wins_and_the_first_round_does_not_count():
    exploration = Exploration(PLANS, Exploring(rounds=3, warmup=1))
    seconds = {DEFAULT: 1.0, BMM: 1.25, SMALL: 0.5}
    run(exploration, lambda plan, step: 50.0 if step <= 3 and plan == SMALL else seconds[plan])
    best, candidates = exploration.conclude()
    assert PLANS[best] == SMALL
    assert [(c.plan, c.ratio, c.median, c.n, c.spread) for c in candidates] == [
        (DEFAULT, 1.0, 1.0, 3, 0.0),
        (BMM, 1.25, 1.25, 3, 0.0),
        (SMALL, 0.5, 0.5, 3, 0.0),
    ]
    assert all(c.error is None for c in candidates)


def test_drift_of_the_machine_cancels():
    # Every round of three steps is twice as slow as the one before: ratios stay, medians do not.
    exploration = Exploration(PLANS, Exploring(rounds=3, warmup=0))
    run(exploration, lambda plan, step: (0.9 if plan == BMM else 1.0) * 2 ** ((step - 1) // 3))
    best, candidates = exploration.conclude()
    assert PLANS[best] == BMM
    assert [c.ratio for c in candidates] == [1.0, 0.9, 1.0]
    assert [c.median for c in candidates] == [2.0, 1.8, 2.0]


def test_a_clear_loser_is_given_up_after_two_rounds():
    exploration = Exploration(PLANS, Exploring(rounds=4, warmup=0, lost=1.5))
    tried = run(exploration, lambda plan, step: 1.6 if plan == BMM else 1.0)
    assert tried.count(BMM) == 2
    assert tried.count(SMALL) == tried.count(DEFAULT) == 4
    assert {c.plan: c.status for c in exploration.conclude()[1]} == {DEFAULT: "ok", BMM: "slow", SMALL: "ok"}


def test_equal_plans_do_not_alternate():
    # 1% apart is within the margin of 2%, whichever of the two runs.
    for incumbent in (0, 1, 2):
        for faster in PLANS:
            exploration = Exploration(PLANS, Exploring(rounds=2, warmup=0), incumbent=incumbent)
            run(exploration, lambda plan, step, faster=faster: 0.99 if plan == faster else 1.0)
            assert exploration.conclude()[0] == incumbent


def test_a_noisy_gain_is_none():
    # Ratios of 0.5, 0.9, 1.3: quartiles 0.7 and 1.1, two standard errors 2 * 0.93 * 0.4 / sqrt(3) = 0.43 > 0.1.
    ratios = {1: 0.5, 2: 0.9, 3: 1.3}
    exploration = Exploration([DEFAULT, BMM], Exploring(rounds=3, warmup=0))
    run(exploration, lambda plan, step: ratios[(step + 1) // 2] if plan == BMM else 1.0)
    best, candidates = exploration.conclude()
    assert best == 0
    assert (candidates[1].ratio, round(candidates[1].spread, 3)) == (0.9, 0.43)


def test_times_that_never_come():
    exploration = Exploration(PLANS, Exploring(rounds=2, warmup=0))
    run(exploration, lambda plan, step: None if plan == SMALL else 1.0)
    best, candidates = exploration.conclude()
    assert best == 0
    assert [c.plan for c in candidates] == [DEFAULT, BMM]
    silent = Exploration(PLANS, Exploring(rounds=2, warmup=0), incumbent=1)
    run(silent, lambda plan, step: None)
    assert silent.conclude() == (1, [])


def test_the_slowest_rank_counts():
    # Here BMM is fast; on another rank it takes 2 in every round.
    exploration = Exploration(PLANS, Exploring(rounds=2, warmup=0))
    run(
        exploration,
        lambda plan, step: 0.5 if plan == BMM else 1.0,
        reduce=lambda row: [max(own, other) for own, other in zip(row, [1.0, 2.0, 0.9])],
    )
    best, candidates = exploration.conclude()
    assert best == 0
    assert [c.median for c in candidates] == [1.0, 2.0, 1.0]


def test_without_a_backward_every_call_is_a_turn():
    exploration = Exploration(PLANS, Exploring(rounds=1, warmup=0))
    turns = [exploration.ask(trains=False, reduce=list) for _ in range(3)]
    assert {turn.plan for turn in turns} == set(PLANS)
    assert exploration.ask(trains=False, reduce=list) is None
    stuck = Exploration(PLANS, Exploring(rounds=1, warmup=0))
    first = [stuck.ask(trains=True, reduce=list) for _ in range(LONGEST_TURN + 1)]
    assert len({id(turn) for turn in first}) == 2, "a turn ends although nobody runs a backward"


def test_a_plan_that_became_slow_is_examined_again():
    watch = Watch(BMM, 1.0, Exploring(window=4, slower=1.5))
    for seconds in (1.4, 1.4, 9.0):  # the median 1.4 is within 1.5 of the record
        assert not watch.ask(list)
        watch.observe(seconds)
    assert not watch.ask(list)
    for seconds in (1.6, 1.6, 0.1):
        assert not watch.ask(list)
        watch.observe(seconds)
    assert watch.ask(list)
    # The slowest rank counts; without any time nothing is concluded.
    assert [watch.ask(lambda row: [2.0]) for _ in range(4)] == [False, False, False, True]
    assert [watch.ask(list) for _ in range(4)] == [False] * 4


@pytest.mark.parametrize(
    ("field", "value"), [("rounds", 0), ("warmup", -1), ("lost", 1.0), ("margin", 1.0), ("window", True), ("slower", 0)]
)
def test_settings_are_checked(field, value):
    with pytest.raises(InvalidValueError, match=f"{field}={value!r}"):
        Exploring(**{field: value})
