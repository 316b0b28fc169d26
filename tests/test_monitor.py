"""What a monitor writes, read back."""

import json
import sys

import pytest
import torch
from torch import nn

import tutelx
from tests.cases import tensor
from tutelx import Capacity, Decision, MoE, Plan
from tutelx.errors import InvalidTypeError, InvalidValueError
from tutelx.gates import TopK
from tutelx.monitor import Monitor


class Planner:
    """Expects what is no number."""

    def __init__(self, predicted=0.25):
        self.predicted = predicted

    def plan(self, workload):
        more = {"predicted_seconds": self.predicted, "measured_seconds": 0.5}
        return Decision(plan=Plan(layout="padded"), source="exact", reason="as measured", workload=workload, **more)


def model():
    """One expert takes all 8 tokens; a factor of 1 leaves it 8/2 = 4."""
    layers = nn.Sequential(
        MoE(6, 8, 2, gate=TopK(k=1), capacity=Capacity.fixed(1.0), planner=Planner()),
        MoE(6, 8, 2, gate=TopK(k=1), planner=Planner(float("nan"))),
    )
    with torch.no_grad():
        for layer in layers:
            layer.gate.weight.copy_(torch.stack([torch.ones(6), -torch.ones(6)]))
    return layers


def read(path):
    def refuse(name):
        raise AssertionError(f"{name} is no number of JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_lines(tmp_path):
    layers, path = model(), tmp_path / "a" / "run.jsonl"
    x = tensor(8, 6).abs()
    with Monitor(layers, jsonl=path, every=2) as monitor:
        for _ in range(3):
            layers[1](layers[0](x)).sum().backward()
            monitor.step()
        assert len(read(path)) == 4, "flushed while it is open"
        monitor.step(8)
    first, second = read(path)[:2]
    assert first.pop("time") > 1.7e9
    assert first.pop("seconds") > 0
    assert first == {
        "schema": 1,
        "step": 0,
        "rank": 0,
        "layer": "0",
        "plan": "padded/256x1024",
        "source": "exact",
        "reason": "as measured",
        "exchange": "",
        "tokens": 8,
        "top_k": 1,
        "capacity": 4,
        "predicted_seconds": 0.25,
        "measured_seconds": 0.5,
        "needed_capacity_factor": 2.0,
        "dropped": 4,
        "drop_rate": 0.5,
        "load": [8, 0],
        "bytes_tokens": 0,
        "bytes_weights": 0,
    }
    # Four rows were dropped before it and are zeros: the router has no preference, and the first expert wins.
    assert (second["layer"], second["dropped"], second["predicted_seconds"]) == ("1", 0, None)
    assert [row["step"] for row in read(path)] == [0, 0, 2, 2], "step 8 has seen no new call"
    layers[0](x)
    assert layers[0]._last.watch.seconds == read(path)[2]["seconds"], "calls are no longer timed"


def test_the_backward_is_timed_too(tmp_path):
    layer = model()[0]
    x = tensor(8, 6, grad=True)
    with Monitor(layer, jsonl=tmp_path / "run.jsonl") as monitor:
        y = layer(x)
        monitor.step()
        y.sum().backward()
        layer(x.detach()).sum().backward()
        monitor.step()
    before, after = read(tmp_path / "run.jsonl")
    assert before["seconds"] is None, "the backward has not run"
    assert after["seconds"] > 0


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    layers = model()
    with Monitor(layers, tensorboard=tmp_path) as monitor:
        for _ in range(2):
            layers(tensor(8, 6).abs())
            monitor.step()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert {"0/seconds", "0/drop_rate", "1/needed_capacity_factor", "0/load_max_over_mean"} <= set(
        events.Tags()["scalars"]
    )
    assert "1/predicted_seconds" not in events.Tags()["scalars"]
    assert [(e.step, e.value) for e in events.Scalars("0/load_max_over_mean")] == [(0, 2.0), (1, 2.0)]
    (text,) = events.Tensors("0/plan/text_summary")
    assert b"padded/256x1024 (exact): as measured" in text.tensor_proto.string_val[0]


def test_without_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        Monitor(model(), jsonl=tmp_path / "run.jsonl", tensorboard=tmp_path)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((3,), InvalidTypeError, "model is int"),
        ((nn.Linear(1, 1),), InvalidValueError, "both None"),
        ((nn.Linear(1, 1), "x", 0), InvalidValueError, "every=0"),
    ],
)
def test_what_cannot_be(arguments, error, match):
    model, *rest = arguments
    with pytest.raises(error, match=match):
        Monitor(model, **dict(zip(("jsonl", "every"), rest)))


def over_ranks(group, folder):
    torch.manual_seed(0)
    layer = MoE(4, 8, 2, gate=TopK(k=1), mesh=group)
    rank = torch.distributed.get_rank(group)
    with (
        Monitor(layer, jsonl=f"{folder}/one.jsonl") as one,
        Monitor(layer, jsonl=f"{folder}/each.jsonl", all_ranks=True) as each,
    ):
        layer(tensor(3 + rank, 4, seed=rank, grad=True)).sum().backward()
        one.step()
        each.step()


def test_ranks(ranks, tmp_path):
    ranks(2).run(over_ranks, str(tmp_path))
    assert {p.name for p in tmp_path.iterdir()} == {"one.jsonl", "each.rank0.jsonl", "each.rank1.jsonl"}
    (line,) = read(tmp_path / "one.jsonl")
    both = [read(tmp_path / f"each.rank{rank}.jsonl")[0] for rank in (0, 1)]
    assert [row["rank"] for row in (line, *both)] == [0, 0, 1]
    assert sum(line["load"]) == 3 + 4
    assert both[0]["load"] == both[1]["load"] == line["load"]
    assert line["exchange"] == "linear over 2 ranks"
    # What one rank sends of its rows the other receives; forward and backward, there and back, 4 floats a row.
    assert sum(row["bytes_tokens"] for row in both) % (4 * 4 * 4) == 0


def test_transformers_are_watched(tmp_path):
    pytest.importorskip("transformers")
    from tests.transformers.families import build, families

    family = next(f for f in families() if f.name == "qwen3_moe")
    network = tutelx.wrap(build(family, dtype=torch.float32))
    with torch.no_grad(), Monitor(network, jsonl=tmp_path / "run.jsonl") as monitor:
        network(torch.arange(8).reshape(1, 8))
        monitor.step()
    rows = read(tmp_path / "run.jsonl")
    assert rows
    assert all(row["seconds"] > 0 and sum(row["load"]) == 8 * row["top_k"] for row in rows)


def test_a_trace_names_the_plan():
    layer = MoE(6, 8, 2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        layer(tensor(8, 6), plan=Plan(layout="padded"))
    names = {event.name for event in profile.events()}
    assert "tutelx padded/256x1024" in names
    layer(tensor(8, 6))
