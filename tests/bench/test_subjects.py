"""Every op's ways agree with each other, and one that does not fails its row."""

import dataclasses
import sys

import pytest
import torch

from tests.tolerance import relative_error
from tutelx.bench import rows
from tutelx.bench.peers import find
from tutelx.bench.shapes import Shape
from tutelx.bench.subject import Way
from tutelx.bench.subjects import SUBJECTS
from tutelx.bench.subjects.route import touched

SHAPE = Shape(T=37, D=24, K=3, E=8, H=16)  # grouped_mm wants strides of 16 bytes
CPU = torch.device("cpu")


def clock(calls) -> float:
    """Runs nothing twice and costs a second a call, so that a row is a few calls."""
    for call in calls:
        call()
    return float(len(calls))


def measure(subject, shape=SHAPE, dtype="float64", peers=None) -> rows.Row:
    return rows.measure(subject, shape, dtype, device=CPU, peers=peers or {}, seconds=1.0, clock=clock)


@pytest.fixture(autouse=True)
def _small_cache(monkeypatch):
    """Few copies: what is checked here is not the time."""
    monkeypatch.setattr(rows.machine, "last_level_cache", lambda device: 4096)


@pytest.mark.parametrize("shape", [SHAPE, Shape(T=1, D=8, K=1, E=8, H=4)], ids=str)
@pytest.mark.parametrize("op", list(SUBJECTS))
def test_ours_equals_plain_torch(op, shape):
    subject = SUBJECTS[op]
    inputs = subject.make(shape, torch.float64)
    ours = subject.compared(inputs, subject.ours(inputs))
    assert all(part.numel() for part in ours)
    for way in subject.plain:
        if way.name == "grouped_mm":  # knows no float64
            continue
        given = subject.compared(inputs, way.call(inputs))
        assert len(given) == len(ours)
        for one, other in zip(ours, given):
            assert relative_error(one, other) <= 1e-10, way.name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("op", list(SUBJECTS))
def test_a_row_of_every_op(op, dtype):
    subject = SUBJECTS[op]
    row = measure(subject, dtype=dtype)
    assert (row.status, row.error) == ("ok", None)
    assert [each.kind for each in row.measured[:3]] == ["ours", "yardstick", "plain"]
    yardsticks = {"expert_ffn": "GEMMs", "expert_linear": "GEMMs", "layer": "GEMMs", "layer_inference": "read"}
    assert row.one("yardstick").name == yardsticks.get(op, "copy")
    assert [each.name for each in row.measured if each.kind == "reference"] == (
        ["reference"] if subject.reference else []
    )
    expected = {"grouped_mm"} if dtype == "float64" and op in yardsticks else set()
    assert row.skipped.keys() == expected
    assert row.percent_of_yardstick() == (100.0, 100.0, 100.0)


@pytest.mark.parametrize("op", list(SUBJECTS))
def test_a_wrong_result_fails_the_row(op):
    subject = SUBJECTS[op]

    def wrong(inputs):
        *parts, last = subject.compared(inputs, subject.ours(inputs))
        return (*parts, last + 1)

    broken = dataclasses.replace(subject, ours=wrong, compared=lambda inputs, output: rows_as(subject, inputs, output))
    row = measure(broken, dtype="float32")
    assert row.status == "failed"
    assert "differs from ours: relative error" in row.error
    assert not row.measured


def rows_as(subject, inputs, output):
    """The broken op gives what is compared already."""
    try:
        return subject.compared(inputs, output)
    except (AttributeError, ValueError, TypeError):
        return output


def test_an_error_in_ours_fails_the_row_and_names_it():
    def raises(inputs):
        raise NotImplementedError("no kernel for this device\nsecond line")

    row = measure(dataclasses.replace(SUBJECTS["encode"], ours=raises))
    assert (row.status, row.error) == ("failed", "NotImplementedError: no kernel for this device")


def test_a_peer_that_differs_or_raises_is_left_out():
    def raises(inputs):
        raise RuntimeError("not here")

    peers = {
        "wrong": Way(name="wrong", call=lambda inputs: inputs.x_TD[inputs.token_R] * 1.1),
        "raises": Way(name="raises", call=raises),
        "right": Way(
            name="right",
            call=lambda own: own[0].index_select(0, own[1]),
            prepare=lambda inputs: (inputs.x_TD * 2, inputs.token_R),
            finish=lambda own, output: output / 2,
        ),
    }
    row = measure(SUBJECTS["encode"], peers=peers)
    assert row.status == "ok"
    assert row.skipped.keys() == {"wrong", "raises"}
    assert "differs from ours" in row.skipped["wrong"]
    assert row.skipped["raises"] == "RuntimeError: not here"
    assert [each.name for each in row.measured if each.kind == "peer"] == ["right"]


def test_the_reference_and_one_hot_masks_stay_small():
    big = Shape(T=4096, D=2, K=1, E=2, H=2)
    row = measure(SUBJECTS["encode"], shape=big, dtype="float32")
    assert row.skipped.keys() == {"reference", "one-hot einsum"}
    assert "4096 slots" in row.skipped["reference"]


def test_what_does_not_fit_is_left_out(monkeypatch):
    monkeypatch.setattr(rows.machine, "available_memory", lambda device: 1000)
    row = measure(SUBJECTS["encode"])
    assert row.status == "left out"
    assert "GB available" in row.error


def test_touched_experts_are_counted():
    assert touched(Shape(T=1, K=3, E=64)) == 3
    assert touched(Shape(T=1000, K=2, E=4)) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layer_routes_as_it_is_told(dtype):
    """Scores have room between them: in low precision too, every way chooses the same experts."""
    inputs = SUBJECTS["layer"].make(SHAPE, dtype)
    inputs.layer(inputs.x_TD)
    counts = inputs.layer.stats.tokens_per_expert.tolist()
    assert [end - begin for _, begin, end in inputs.used] == [count for count in counts if count]
    logits = (inputs.x_TD @ inputs.layer.gate.weight.T).float().sort(dim=1).values
    assert (logits[:, 1:] - logits[:, :-1])[:, -SHAPE.K :].min() > 0.05


def test_absent_peers_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tutel", None)
    found, missing = find(("tutel",), CPU)
    assert not found
    assert missing == {"tutel": "no module tutel"}


@pytest.mark.parametrize("name", ["transformers", "transformers_eager", "transformers_wrapped"])
def test_the_experts_of_transformers(name):
    pytest.importorskip("transformers", reason="transformers is not installed")
    found, missing = find((name,), CPU)
    assert not missing
    row = measure(SUBJECTS["layer"], dtype="float32", peers=found[name])
    assert (row.status, row.skipped) == ("ok", {})
    assert row.measured[-1].name == name.replace("_", " ")
