"""`tutelx bench pipeline`: what is measured and what is made of it. How much is hidden no test can say."""

import pytest
import torch

from tutelx.bench import pipeline
from tutelx.bench.pipeline import PipelineResult, PipelineSettings, measure
from tutelx.bench.timing import Stats
from tutelx.cli import main
from tutelx.errors import InvalidValueError

TINY = PipelineSettings(tokens=6, model_dim=4, top_k=2, hidden_dim=8, dtype="float64", seconds=1e-3)


def tiny(group):
    return measure(TINY, group, torch.device("cpu"))


def test_all_ranks_have_one_result(ranks):
    first, second = ranks(4).run(tiny, ranks=(1, 3))
    assert first == second
    assert (first.world, first.num_experts, first.hidden_dim) == (2, 2, 8)
    assert list(first.layer) == [1, 2, 4, 8]
    assert {each.n for each in (first.compute, first.exchange, *first.layer.values())} == {pipeline.LEAST_ROUNDS}
    # 12 rows, half of them for the other rank; there and back, their gradients too: 4 * 6 rows of 4 * 8 bytes.
    assert first.exchange_bytes == 4 * 6 * 4 * 8


def calibrated(group):
    pipeline._MOST_HIDDEN = 128
    return measure(PipelineSettings(tokens=6, model_dim=4, seconds=1e-3), group, torch.device("cpu")).hidden_dim


def test_the_hidden_dim_is_found_within_its_limits(ranks):
    found = set(ranks(4).run(calibrated, ranks=(0, 1)))
    assert len(found) == 1
    assert found <= {64, 128}


def stats(median: float) -> Stats:
    return Stats(median=median, q1=median, q3=median, n=5, calls_per_sample=1)


def test_hidden_and_its_share_by_hand():
    layer = {1: stats(1.0), 2: stats(0.7)}
    found = PipelineResult(world=2, num_experts=2, hidden_dim=8, compute=stats(0.5), exchange=stats(0.4),
                           exchange_bytes=1, layer=layer)  # fmt: skip
    assert found.hidden(2) == pytest.approx(0.3)
    assert found.share(2) == pytest.approx(0.75)
    [hidden] = found.as_json()["hidden"]
    assert (hidden["degree"], hidden["seconds"], hidden["share"]) == (2, pytest.approx(0.3), pytest.approx(0.75))


def refused(group):
    with pytest.raises(InvalidValueError, match="num_experts=3 is no multiple of the 2 ranks"):
        measure(PipelineSettings(num_experts=3), group, torch.device("cpu"))


def test_experts_that_do_not_divide_are_refused(ranks):
    ranks(4).run(refused, ranks=(0, 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pipeline"], "pipeline runs on several ranks, but RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT is not set"),
        (["pipeline", "gate"], "pipeline runs alone, not with gate"),
        (["pipeline", "--against", "a.json"], "--against is not for pipeline"),
        (["pipeline", "--sizes", "T=0"], "tokens=0 must be at least 1"),
        (["pipeline", "--seconds", "0"], "seconds=0.0 must be positive and finite"),
    ],
)
def test_wrong_use(monkeypatch, capsys, arguments, message):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err
