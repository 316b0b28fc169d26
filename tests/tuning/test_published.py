"""The sheet a100-hdr against the figures of Tutel's paper: what is best where, and the one-layer table."""

import pytest

from tutelx.tuning.cost import SHEETS, RateModel
from tutelx.tuning.cost import published as paper

MODEL = RateModel(SHEETS["a100-hdr"])


@pytest.mark.parametrize(
    ("gpus", "total", "compute", "exchange"),
    [(16, 560.9, 371.8, 189.1), (64, 698.9, 375.1, 323.8), (256, 866.4, 375.1, 491.3)],
)
def test_the_one_layer_table(gpus, total, compute, exchange):
    cost = paper.one_layer(MODEL, gpus)
    assert cost.total * 1e3 == pytest.approx(total, rel=0.07)
    assert cost.compute * 1e3 == pytest.approx(compute, rel=0.03)
    assert cost.exchange * 1e3 == pytest.approx(exchange, rel=0.07)


@pytest.mark.parametrize(("gpus", "degree"), [(16, 2), (32, 2), (64, 2), (128, 2), (256, 1)])
def test_the_best_linear_degree(gpus, degree):
    assert paper.best_degree(MODEL, gpus) == degree


def test_linear_wins_through_128_gpus_and_loses_at_256():
    ratios = {gpus: paper.relative_time(MODEL, gpus, 1, "2dh") for gpus in (16, 32, 64, 128, 256)}
    assert all(ratios[gpus] > 1 for gpus in (16, 32, 64, 128))
    assert ratios[256] < 1


def test_the_shard_degree_over_the_capacity():
    small = [paper.best_shards(MODEL, 4096, 2048, (0, 1), f) for f in (1, 2, 4, 8, 16)]
    assert small[0] == 1
    assert small[-1] == 0
    assert small == sorted(small, reverse=True)
    deep = [paper.best_shards(MODEL, 1024, 32768, (0, 1, 2, 4), f) for f in (0.25, 0.5, 1, 2, 4, 8, 16)]
    assert sorted(set(deep), reverse=True) == [4, 2, 1]
    assert deep == sorted(deep, reverse=True)


def test_every_figure_is_shown():
    found = paper.figures(MODEL)
    assert not [figure.name for figure in found if figure.verdict == "differs"]
    assert len({figure.name for figure in found}) == len(found)
    two_steps = next(figure for figure in found if figure.name.startswith("2dh over linear"))
    assert float(two_steps.ours.rstrip("x")) == pytest.approx(4.25, rel=0.1)
