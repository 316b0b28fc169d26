"""Wrapped and as written agree: outputs and all gradients."""

import copy
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tutelx
from tests import models
from tests.wrap.compare import assert_same, run, tokens, wrapped
from tutelx.planner import FixedPlanner

EXPERTS = {"swiglu": models.SwiGLU, "ffn": models.FFN}
STYLES = [models.MoE, models.Unnormalized, models.Renormalized]


def both(layer: nn.Module):
    return wrapped(copy.deepcopy(layer)), layer


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("expert", EXPERTS)
@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (3, 1), (3, 2), (3, 3), (8, 1), (8, 2), (8, 8)])
def test_grid(dtype, style, expert, num_experts, top_k):
    layer, original = both(style(num_experts=num_experts, top_k=top_k, expert=EXPERTS[expert]).to(dtype))
    for count in (0, 1, 7, 512):
        assert_same(layer, original, tokens(count, 16, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("top_k", [1, 2, 64])
def test_grid_of_64_experts(dtype, style, top_k):
    for expert in EXPERTS.values():
        layer, original = both(style(8, 12, num_experts=64, top_k=top_k, expert=expert).to(dtype))
        for count in (0, 1, 7, 512):
            assert_same(layer, original, tokens(count, 8, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("style", [models.Sigmoid, models.Float32Chosen, models.Float32Renormalized])
def test_other_scores(style, dtype):
    layer, original = both(style(num_experts=8, router_bias=True).to(dtype))
    assert_same(layer, original, tokens(33, 16, dtype=dtype))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_ties_of_low_precision_are_broken_as_before(style, dtype):
    layer, original = both(style(num_experts=16, top_k=3).to(dtype))
    x = tokens(2000, 16, dtype=dtype)
    logits = original.gate(x)
    scores = logits.softmax(dim=-1).sort(dim=-1, descending=True).values
    assert (scores[:, 2] == scores[:, 3]).any(), "no token whose choice is a tie"
    ours, expected = layer(x).double(), original(x).double()
    errors = (ours - expected).abs().amax(dim=1) / expected.abs().amax(dim=1)
    assert float(errors.detach().max()) < 0.05


def test_grouped_products():
    layer, original = both(models.MoE())
    grouped = tutelx.Plan(expert_kernel="grouped")
    layer.planner = FixedPlanner(grouped)
    assert_same(layer, original, tokens(50, 16))
    assert layer.last_decision.plan == grouped
    # A loop that skips empty experts leaves them without a gradient, which grouped products cannot.
    skips, _ = both(models.Unnormalized())
    with pytest.raises(tutelx.errors.InvalidValueError, match=r"plan\.expert_kernel='grouped'"):
        skips(tokens(50, 16), plan=grouped)
    with torch.no_grad():
        torch.testing.assert_close(skips(tokens(50, 16), plan=grouped), skips(tokens(50, 16)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", [nn.SiLU(), nn.GELU(), nn.GELU(approximate="tanh"), nn.ReLU()], ids=str)
def test_activations(activation, bias):
    expert = partial(models.FFN, activation=activation, bias=bias)
    layer, original = both(models.MoE(expert=expert).double())
    assert_same(layer, original, tokens(50, 16, dtype=torch.float64))


@settings(max_examples=20)
@given(
    model_dim=st.integers(1, 20),
    hidden_dim=st.integers(1, 20),
    num_experts=st.integers(1, 6),
    data=st.data(),
)
def test_any_shape(model_dim, hidden_dim, num_experts, data):
    top_k = data.draw(st.integers(1, num_experts))
    style = data.draw(st.sampled_from(STYLES))
    torch.manual_seed(data.draw(st.integers(0, 3)))
    written = style(model_dim, hidden_dim, num_experts, top_k, expert=partial(models.SwiGLU, bias=True)).double()
    layer = tutelx.wrap(copy.deepcopy(written))
    # One model dim leaves experts that differ by a factor only; then declining is right too.
    assert isinstance(layer, tutelx.wrapping.WrappedMoE) or model_dim < 3
    assert_same(layer, written, tokens(data.draw(st.integers(0, 9)), model_dim, dtype=torch.float64))


def test_square_experts_are_told_apart_by_their_numbers():
    layer, original = both(models.MoE(model_dim=16, hidden_dim=16).double())
    assert (layer.spec.formula.gate, layer.spec.formula.up, layer.spec.formula.down) == (("w1",), ("w3",), ("w2",))
    assert_same(layer, original, tokens(20, 16, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(16,), (5, 16), (2, 3, 16), (2, 2, 2, 16)])
def test_any_leading_dimensions(shape):
    layer, original = both(models.MoE())
    assert_same(layer, original, tokens(*shape))


def test_input_of_any_strides():
    layer, original = both(models.MoE())
    assert_same(layer, original, tokens(16, 40).T)
    assert_same(layer, original, tokens(4, 10, 16).transpose(0, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_autocast(dtype):
    layer, original = both(models.Renormalized(num_experts=8))
    x = tokens(40, 16)
    with torch.autocast("cpu", dtype=dtype):
        assert_same(layer, original, x, dtype=dtype)


def test_unused_experts_have_the_gradient_they_had():
    x = tokens(1, 16)
    for style, present in ((models.MoE, True), (models.Unnormalized, False)):
        layer, original = both(style(num_experts=8, top_k=2))
        for module in (layer, original):
            _, grads = run(module, x)
            weights = [grads[f"experts.{e}.w1.weight"] for e in range(8)]
            unused = [g for g in weights if g is None or not g.any()]
            assert len(unused) == 6
            assert all((g is not None) == present for g in unused)


@pytest.mark.parametrize("tamper", ["zero_router", "zero_down", "equal_experts"])
def test_weights_that_show_nothing(tamper):
    """Fresh or upcycled layers: the rule is then found with other weights in place of their own."""
    written = models.Renormalized(num_experts=8).double()
    with torch.no_grad():
        for expert in written.experts:
            if tamper == "zero_down":
                expert.w2.weight.zero_()
            elif tamper == "equal_experts":
                expert.load_state_dict(written.experts[0].state_dict())
        if tamper == "zero_router":
            written.gate.weight.zero_()
    layer = wrapped(copy.deepcopy(written))
    assert (layer.spec.rule.k, layer.spec.rule.score, layer.spec.rule.normalize) == (2, "softmax", True)
    trained = models.Renormalized(num_experts=8).double().state_dict()
    for module in (layer, written):
        module.load_state_dict(trained)
    assert_same(layer, written, tokens(30, 16, dtype=torch.float64))


def test_layers_that_return_their_logits():
    layer, original = both(models.WithLogits().double())
    x = tokens(2, 5, 16, dtype=torch.float64)
    for ours, expected in zip(layer(x), original(x)):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


def test_call_arguments_are_for_this_call():
    layer, original = both(models.Renormalized(num_experts=8, top_k=2))
    x = tokens(30, 16)
    original.args.num_experts_per_tok = 5
    torch.testing.assert_close(layer(x, top_k=5), original(x), rtol=1e-5, atol=1e-6)
    original.args.num_experts_per_tok = 2
    padded = tutelx.Plan(layout="padded")
    torch.testing.assert_close(layer(x=x, plan=padded), original(x), rtol=1e-5, atol=1e-6)
    assert layer.last_decision.plan == padded
    layer(x, capacity=tutelx.Capacity.fixed(0.5))
    assert layer.stats.dropped > 0


def test_wrong_calls_are_named():
    layer = wrapped(models.MoE())
    with pytest.raises(tutelx.errors.InvalidValueError, match=r"top_k=9 exceeds num_experts=4"):
        layer(tokens(3, 16), top_k=9)
    with pytest.raises(tutelx.errors.InvalidTypeError, match="mask was given, expected x"):
        layer(mask=tokens(3, 16))
    with pytest.raises(tutelx.errors.InvalidValueError, match=r"expected \[..., model_dim=16\]"):
        layer(tokens(3, 15))
