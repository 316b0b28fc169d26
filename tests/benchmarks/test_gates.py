"""The training of every gate on two ranks: a few steps of it, and what its table says."""

import dataclasses
import json

import pytest
import torch
from torch import distributed as dist

from benchmarks import gates as benchmark
from tutelx.demo.settings import Settings

TINY = Settings(steps=4, experts=8, top_k=2, dim=8, layers=1, hidden=8, batch=8, seq=64, lr=2e-2)
RESULT = benchmark.Result(
    gate="A", first_loss=5.0, final_loss=2.5, drop_rate=0.125, load_cv=0.5, step_seconds=0.0125, losses=[5.0, 2.5]
)


def train_all(group):
    return [benchmark.train(name, TINY, group.rank(), dist.get_world_size()) for name in benchmark.ENTRIES]


def test_every_gate_trains_on_two_ranks(ranks):
    one, other = ranks(2).run(train_all)
    for mine, theirs in zip(one, other):
        assert mine == theirs, "figures are those of both ranks"
        assert mine.fell, mine
        assert 5 < mine.losses[0] < 6.5, "ln 256 = 5.5 before the first step"
        assert 0 <= mine.drop_rate < 1
        assert mine.load_cv >= 0
    found = {result.gate: result for result in one}
    assert found["ExpertChoice"].drop_rate == 0
    assert found["Switch, rerouting"].drop_rate <= found["Switch"].drop_rate
    assert found["TopK"].losses != found["Switch"].losses


def test_losses_are_the_mean_of_both_ranks(ranks):
    """The means over two ranks of the same entry are those of the ranks alone."""
    single = ranks(2).run(losses_alone)
    both = ranks(2).run(losses_together)[0]
    expected = (torch.tensor(single[0]) + torch.tensor(single[1])) / 2
    assert both[0] == pytest.approx(expected[0].item(), abs=2e-4), "the first step is that of equal parameters"


def losses_together(group):
    return benchmark.train("TopK", TINY, group.rank(), 2).losses


def losses_alone(group):
    """The first loss of a rank, from its own batch."""
    model = benchmark.model_of(benchmark.ENTRIES["TopK"], TINY, group.rank())
    batches = benchmark.Batches(benchmark.load(TINY).training, TINY, TINY.steps * 2, seed=TINY.seed)
    inputs, targets = batches[group.rank()]
    return [torch.nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).item()]


def test_the_table():
    assert benchmark.table([RESULT]).splitlines()[2] == "| A | 2.500 | 12.5% | 0.50 | 12.5 |"


@pytest.mark.parametrize(("final", "code"), [(2.5, 0), (5.5, 1)])
def test_the_command(tmp_path, monkeypatch, capsys, final, code):
    asked = []

    def run(names, settings, ranks, report):
        asked.append((names, settings.steps, ranks))
        result = dataclasses.replace(RESULT, final_loss=final)
        report(result)
        return [result]

    monkeypatch.setattr(benchmark, "run", run)
    file = tmp_path / "new" / "gates.json"
    assert benchmark.main(["--gate", "TopK", "--steps", "7", "--json", str(file)]) == code
    assert asked == [(["TopK"], 7, 2)]
    assert "| A |" in capsys.readouterr().out
    record = json.loads(file.read_text())
    assert record["rows"][0]["gate"] == "A"
    assert record["settings"]["steps"] == 7
    assert record["machine"]["torch"] == torch.__version__


def test_unknown_names():
    with pytest.raises(ValueError, match="gate 'top' is none of TopK; "):
        benchmark.main(["--gate", "top"])
    with pytest.raises(ValueError, match="ranks=0 must be at least 1"):
        benchmark.main(["--ranks", "0"])
