"""Who wins a race whose times are known."""

import random

import pytest

from tutelx.tuner.race import LEAST_TURNS, MOST_TURNS, Race, quartile_distance


def run(means, noise=0.0, seconds=1e9, seed=0, drift=lambda turn: 1.0):
    """Every sample is its plan's mean, times noise, times what the machine does in that turn."""
    draw, race, elapsed = random.Random(seed), Race(len(means), seconds=seconds, seed=seed), 0.0
    while not race.over(elapsed):
        slow = drift(race.turns)
        turn = {i: means[i] * slow * (1 + noise * draw.gauss(0, 1)) for i in race.order()}
        race.add(turn)
        elapsed += sum(turn.values())
    return race


def test_ratios_by_hand():
    race = Race(2, seconds=1)
    for default, other in ((1.0, 0.5), (2.0, 1.2), (4.0, 2.8), (1.0, 0.9)):
        race.add({0: default, 1: other})
    runner = race.runners[1]
    # Ratios 0.5, 0.6, 0.7, 0.9: median 0.65; quartiles 0.575 and 0.75, which lie at 0.75 and 2.25 of 0..3.
    assert runner.ratio == pytest.approx(0.65)
    # Two standard errors, 5/3 for four turns: 2 * 5/3 * 1.2533 * 0.175 / 1.349 / 2 = 0.27098.
    assert runner.spread == pytest.approx(0.27098, rel=1e-4)
    assert runner.median == pytest.approx(1.05)
    assert quartile_distance([0.5, 0.6, 0.7, 0.9]) == pytest.approx(0.175)


def test_equal_times_end_after_the_least_turns():
    race = run([1.0, 0.9, 1.0])
    assert race.turns == LEAST_TURNS
    assert race.runners[1].ratio == pytest.approx(0.9)


def test_a_slow_moment_falls_on_all():
    race = run([1.0, 0.95], drift=lambda turn: 1 + turn % 3)
    assert race.runners[1].ratio == pytest.approx(0.95)
    assert race.runners[1].spread == pytest.approx(0)


@pytest.mark.parametrize("seed", range(5))
def test_five_percent_are_told_apart_under_ten_percent_noise(seed):
    race = run([1.0, 0.95, 1.05], noise=0.07, seed=seed)
    best = min(range(3), key=lambda i: race.runners[i].ratio)
    assert best == 1
    assert race.runners[1].ratio + race.runners[1].spread < 1


@pytest.mark.parametrize("seed", range(5))
def test_what_is_equal_is_not_better(seed):
    race = run([1.0, 1.0], noise=0.1, seed=seed)
    assert race.runners[1].ratio + race.runners[1].spread > 1


def test_clear_losers_stop_early_and_the_default_never():
    race = run([3.0, 1.0, 1.6, 1.2, 1.01], noise=0.01)
    turns = [len(runner.seconds) for runner in race.runners]
    # Twice half as slow again as the best: gone. 1.2 needs its spread.
    assert turns[2] == 2
    assert turns[3] == 3
    assert [runner.stopped for runner in race.runners] == [False, False, True, True, False]
    assert turns[0] == turns[1] == race.turns


def test_one_outlier_stops_nobody():
    race = Race(2, seconds=1e9)
    race.add({0: 1.0, 1: 9.0})
    for _ in range(4):
        race.add({0: 1.0, 1: 0.8})
    assert not race.runners[1].stopped
    assert race.runners[1].ratio == pytest.approx(0.8)


def test_the_time_ends_a_race_but_not_before_the_least_turns():
    assert run([1.0, 0.99], noise=0.3, seconds=1e-9).turns == LEAST_TURNS
    assert run([1.0, 0.99], noise=0.3).turns == MOST_TURNS


def test_the_order_is_drawn_anew_and_the_same_for_equal_histories():
    one, other = Race(6, seconds=1, seed=3), Race(6, seconds=1, seed=3)
    orders = [one.order() for _ in range(4)]
    assert orders == [other.order() for _ in range(4)]
    assert len({tuple(order) for order in orders}) > 1
    assert all(sorted(order) == list(range(6)) for order in orders)


def test_ended_before_the_start():
    race = Race(2, seconds=1)
    race.stop(1, 8.0, 2.0)
    assert race.order() == [0]
    assert (race.runners[1].ratio, race.runners[1].seconds) == (4.0, [8.0])
