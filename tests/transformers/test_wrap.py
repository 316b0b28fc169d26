"""What `wrap` and `unwrap` do to a model of transformers, and what they leave as it was."""

from __future__ import annotations

import copy
import io
import logging

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="transformers is not installed")

import transformers

import tutelx
from tests.transformers.families import build, experts_of, families
from tests.transformers.test_families import assert_same, run, tokens
from tutelx.integrations.transformers import NAME, setting_of
from tutelx.planner import FixedPlanner, RulePlanner
from tutelx.wrapping import explain

BY_NAME = {family.name: family for family in families()}


def small(name: str = "qwen3_moe", dtype: torch.dtype = torch.float64, **changes):
    return build(BY_NAME[name], dtype=dtype, **changes)


class Counting(RulePlanner):
    """Says how often it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def plan(self, workload):
        self.calls += 1
        return super().plan(workload)


def test_by_the_librarys_own_switch():
    model = small()
    expected = run(model, tokens())
    model.set_experts_implementation(NAME)
    assert model.get_experts_implementation()[""] == NAME
    assert_same(run(model, tokens()), expected, 1e-10)
    (report, *_) = explain(model)
    assert report.already
    tutelx.unwrap(model)
    assert model.get_experts_implementation()[""] == NAME, "what was not wrapped is not unwrapped"
    assert type(model)(copy.deepcopy(model.config)).config._experts_implementation == NAME


def test_parameters_stay_the_same_objects():
    model = small()
    before = dict(model.named_parameters())
    places = {name: parameter.data_ptr() for name, parameter in before.items()}
    modules = dict(model.named_modules())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tutelx.wrap(model)
    assert dict(model.named_modules()) == modules
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == places
    other = copy.deepcopy(tutelx.unwrap(copy.deepcopy(model)))
    theirs = torch.optim.SGD(other.parameters(), lr=0.1)
    for step in (optimizer, theirs):
        run(model if step is optimizer else other, tokens())
        step.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, other.get_parameter(name), rtol=1e-10, atol=1e-12)


def allocated(call) -> int:
    """The most bytes that `call` holds beyond what there was, C++ allocations included."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    now = most = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    del result
    return most


def test_no_second_set_of_weights():
    """One layer of 16 experts: wrapping and a forward need next to nothing beside the weights, a backward needs their
    gradients once. Eager needs the gradients of all for every expert that got a token."""
    model = small("qwen3_moe", torch.float32, num_experts=16, hidden_size=64, moe_intermediate_size=128, head_dim=16)
    experts = experts_of(model)
    bytes_of_experts = sum(p.numel() * 4 for module in experts.values() for p in module.parameters())
    bytes_of_all = sum(p.numel() * 4 for p in model.parameters())
    ids = tokens()[:1, :4]

    def step():
        model.zero_grad(set_to_none=True)
        model(ids, labels=ids).loss.backward()

    assert bytes_of_experts > 0.8 * bytes_of_all
    eager = allocated(step)
    assert allocated(lambda: tutelx.wrap(model, strict=True)) < 0.1 * bytes_of_experts
    with torch.no_grad():
        assert allocated(lambda: model(ids)) < 0.1 * bytes_of_experts
    model.zero_grad(set_to_none=True)
    ours = allocated(step)
    assert ours < 1.2 * bytes_of_all
    assert eager > 1.2 * bytes_of_all, "the measure sees nothing"


def test_models_of_one_configuration_have_their_own_state():
    first = small()
    second = type(first)(first.config).double().eval()
    second.load_state_dict(first.state_dict())
    planner = Counting()
    expected = second(tokens()).logits
    tutelx.wrap(first, planner=planner)
    assert torch.equal(second(tokens()).logits, expected)
    assert planner.calls == 0
    first(tokens())
    assert planner.calls == len(experts_of(first))
    tutelx.wrap(second)
    tutelx.unwrap(first)
    assert all(report.already for report in explain(second))
    assert not any(report.already for report in explain(first))
    tutelx.unwrap(second)
    assert first.config._experts_implementation == "eager"


def test_a_part_of_a_model():
    model = small()
    tutelx.wrap(model.model.layers[1])
    assert [report.already for report in explain(model)] == [False, True]
    ids, planner = tokens(), Counting()
    expected = run(tutelx.unwrap(model), ids)
    tutelx.wrap(model.model.layers[0], planner=planner)
    assert_same(run(model, ids), expected, 1e-10)
    assert planner.calls == 1


@pytest.mark.parametrize("how", ["deepcopy", "save"])
def test_copies_stay_wrapped(how):
    model = tutelx.wrap(small())
    expected = run(model, tokens())
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert all(report.already for report in explain(twin))
    assert all(setting_of(module).stats is None for module in experts_of(twin).values())
    assert_same(run(twin, tokens()), expected, 1e-10)
    tutelx.unwrap(twin)
    assert twin.config._experts_implementation == "eager"
    assert all(report.already for report in explain(model))


def test_switched_off_by_the_library_and_wrapped_again():
    model = tutelx.wrap(small())
    model.set_experts_implementation("eager")
    assert not any(report.already for report in explain(model))
    tutelx.wrap(model)
    assert all(report.already for report in explain(model))
    assert tutelx.unwrap(model).config._experts_implementation == "eager"


def test_capacity_and_planner_are_handed_on(caplog):
    planner = FixedPlanner(tutelx.Plan(tile_rows=3, tile_columns=5))
    model = tutelx.wrap(small(), capacity=tutelx.Capacity.fixed(0.5), planner=planner)
    model(tokens())
    for module in experts_of(model).values():
        setting = setting_of(module)
        assert setting.last_decision.source == "fixed"
        assert setting.stats.dropped > 0
    model = tutelx.wrap(small(), planner=FixedPlanner(tutelx.Plan(layout="padded")))
    with pytest.raises(tutelx.errors.InvalidValueError, match=r"plan=padded/.*ragged rows in tiles only"):
        model(tokens())


class Own(transformers.Qwen3MoeForCausalLM):
    """The library looks for experts in the file of the class: its own switch may do nothing here."""


def test_a_subclass_of_a_model():
    model = Own(small().config).double().eval()
    expected = model(tokens()).logits
    planner = Counting()
    ours = tutelx.wrap(model, strict=True, planner=planner)(tokens()).logits
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
    assert planner.calls == 2


def tampered(model, how: str) -> nn.Module:
    layer = model.model.layers[1].mlp
    experts = layer.experts

    class Changed(type(experts)):
        def forward(self, *args):
            return 2 * super().forward(*args)

    class Scaled(type(experts)):
        def _apply_gate(self, hidden):
            return super()._apply_gate(hidden)

    if how == "forward":
        experts.__class__ = Changed
    elif how == "gate":
        experts.__class__ = Scaled
    elif how == "instance":
        experts.forward = lambda *args: type(experts).forward(experts, *args)
    elif how == "dtype":
        experts.down_proj = nn.Parameter(experts.down_proj.float())
    elif how == "flag":
        experts.has_gate = False
        experts.up_proj = nn.Parameter(experts.gate_up_proj[:, :16].clone())
    elif how == "nan":
        experts.down_proj.data.fill_(float("nan"))
    return model


@pytest.mark.parametrize(
    ("how", "attribute", "reason"),
    [
        ("forward", "forward", "does not ask the registry: TypeError"),
        ("instance", "forward", "is replaced on this very object"),
        ("dtype", "down_proj", "is of torch.float32, `gate_up_proj` is of torch.float64"),
        ("flag", "forward", "computes something else: relative error"),
        ("nan", "forward", "gives values that are not finite"),
    ],
)
def test_experts_that_are_left_alone(how, attribute, reason, caplog):
    model = tampered(small(), how)
    first, second = explain(model)
    assert first.recognised
    assert (second.attribute, second.recognised) == (attribute, False)
    assert reason in second.reason
    with pytest.raises(tutelx.errors.InvalidValueError, match="is left alone"):
        tutelx.wrap(model, strict=True)
    assert model.config._experts_implementation == "eager"
    with caplog.at_level(logging.WARNING, logger="tutelx"):
        tutelx.wrap(model)
    assert reason in caplog.text
    assert [report.already for report in explain(model)] == [True, False]


def test_a_gate_of_its_own_is_called():
    model = tampered(small(), "gate")
    expected = run(model, tokens())
    tutelx.wrap(model, strict=True)
    first, second = explain(model)
    assert "silu(gate(x)) * up(x)" in str(first)
    assert "_apply_gate(gate(x), up(x))" in str(second)
    assert_same(run(model, tokens()), expected, 1e-10)


def test_verify_compares_the_parameters_gradients_too(monkeypatch):
    model = small()
    tutelx.wrap(model, verify=True)
    tutelx.unwrap(model)

    from tutelx.integrations.transformers import parity

    def frozen(experts, *args):
        experts.down_proj = nn.Parameter(experts.down_proj.detach(), requires_grad=False)
        return right(experts, *args)

    right = parity.experts_forward
    monkeypatch.setattr(parity, "experts_forward", frozen)
    with pytest.raises(tutelx.errors.ParityError, match=r"layers.0.mlp.experts .* another gradient of down_proj"):
        tutelx.wrap(model, verify=True)
    assert model.config._experts_implementation == "eager"


def test_on_the_meta_device_nothing_is_compared():
    with torch.device("meta"):
        model = transformers.Qwen3MoeForCausalLM(small().config)
    (report, *_) = explain(model)
    assert report.recognised
    assert "numbers not compared" in str(report)
