"""The scheduler's benchmarks: traces are replayed with their load, and the totals are what the samples say."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import traces
from benchmarks.held_out import summary
from benchmarks.replay import _oracle_of_other_rounds, trace
from benchmarks.setting import Setting
from tutelx.errors import InvalidValueError
from tutelx.tuner.grid import World
from tutelx.tuner.shapes import Shape


def call(load, top_k=1):
    return traces.Call(
        step=0, layer="moe", tokens=sum(load) // top_k, top_k=top_k, needed_capacity_factor=1.0, load=tuple(load)
    )


@given(st.lists(st.integers(0, 50), min_size=2, max_size=6), st.integers(1, 2), st.integers(1, 40))
def test_replayed_ids_have_the_recorded_shares(load, top_k, tokens):
    if sum(load) == 0 or max(load) * top_k > sum(load):
        return  # no tokens, or more slots of one expert than tokens
    ids = call(load, top_k).expert_ids(tokens)
    assert ids.shape == (tokens, top_k)
    assert ids.dtype == torch.int32
    assert all(len(set(row)) == top_k for row in ids.tolist())
    found = torch.bincount(ids.flatten(), minlength=len(load))
    wanted = torch.tensor(load) / sum(load) * tokens * top_k
    assert (found - wanted).abs().max() <= 1.5  # each end of a share is rounded to a slot


def test_square_wave():
    calls = traces.synthetic(4, 4, tokens=6, period=4)
    # 6 tokens over 4 experts for two steps, then 24.
    assert [c.load for c in calls] == [(1, 2, 1, 2), (1, 2, 1, 2), (6, 6, 6, 6), (6, 6, 6, 6)]
    assert [c.needed_capacity_factor for c in calls] == [2 * 4 / 6, 2 * 4 / 6, 1.0, 1.0]


def test_traces_are_read_as_written(tmp_path):
    path = tmp_path / "trace.jsonl"
    traces.write(path, [call([3, 1])])
    assert traces.read(path) == [call([3, 1])]
    path.write_text(path.read_text() + json.dumps({"step": 1}) + "\n")
    with pytest.raises(InvalidValueError, match="line 2"):
        traces.read(path)


@pytest.mark.parametrize("name", ["demo", "square"])
def test_kept_traces(name):
    calls = traces.read(Path(traces.__file__).parent / "traces" / f"{name}.jsonl")
    assert len({c.step for c in calls}) == 200
    for c in calls:
        assert sum(c.load) == c.tokens * c.top_k
        assert max(c.load) * len(c.load) / sum(c.load) == pytest.approx(c.needed_capacity_factor)


def replay(group, db):
    setting = Setting(shape=Shape(model_dim=4, hidden_dim=4, num_experts=4), world=World(world=2), group=group, db=db)
    return trace(setting, [call([2, 2, 2, 2]), call([5, 1, 1, 1])], scale=1.0, rounds=1)


def test_totals(ranks, tmp_path):
    found, other = ranks(2).run(replay, tmp_path)
    names = ["r1/d1", "r0", "r1/d2", "r1/d4", "r1/d8"]
    assert sorted(found["static_seconds"]) == sorted(names)
    assert found["samples"] == other["samples"]  # both ranks know the slowest's
    for name in names:
        assert found["static_seconds"][name] == pytest.approx(sum(s[name][0] for s in found["samples"]))
    oracle = sum(min(s[name][0] for name in names) for s in found["samples"])
    assert found["adaptive_over_oracle"] == pytest.approx(found["adaptive_seconds"] / oracle)
    assert sum(found["chosen"].values()) == 2


def test_oracle_of_other_rounds():
    sample = {"a": [1.0, 2.0, 8.0], "b": [4.0, 0.5, 1.5], "c": [9.0, 9.0, 9.0]}
    # Means of the others: a 5, 4.5, 1.5; b 1, 2.75, 2.25.
    assert _oracle_of_other_rounds(sample, ["a", "b", "c"]) == pytest.approx((4.0 + 0.5 + 8.0) / 3)
    assert _oracle_of_other_rounds({"a": [3.0], "b": [2.0]}, ["a", "b"]) == 2.0


def test_summary():
    rows = [{"chosen_over_best": b, "chosen_over_default": d} for b, d in ((1.0, 0.5), (1.2, 1.0), (1.1, 0.9))]
    found = summary([*rows, {"chosen_over_best": None, "chosen_over_default": None}])
    assert (found["workloads"], found["not_timed"]) == (4, 1)
    assert (found["median_over_best"], found["worst_over_best"]) == (1.1, 1.2)
    assert (found["best_over_default"], found["worst_over_default"]) == (0.5, 1.0)
