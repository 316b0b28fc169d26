"""What a layer refuses, and checkpoints."""

import logging

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tutelx.integrations.tutel import moe
from tutelx.integrations.tutel.activations import known_activation

FFN = {"type": "ffn", "num_experts_per_device": 2, "hidden_size_per_expert": 4}


def build(**change):
    return moe.moe_layer(**{"gate_type": {"type": "top", "k": 1}, "model_dim": 6, "experts": FFN, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate_type": "Top"}, "'Top'"),
        ({"gate_type": {"type": "best"}}, "type='best'"),
        ({"gate_type": {"k": 2}}, "a dict with 'type'"),
        ({"gate_type": {"type": "top", "k": 0}}, "k=0"),
        ({"gate_type": {"type": "top", "noise": 1}}, "no option 'noise'"),
        ({"gate_type": {"type": "custom"}}, "no 'module'"),
        ({"model_dim": 0}, "model_dim=0"),
        ({"experts": None}, "experts is NoneType"),
        ({"experts": {**FFN, "type": "mlp"}}, "type='mlp'"),
        ({"experts": {**FFN, "type": "custom"}}, "no 'module'"),
        ({"experts": {**FFN, "num_experts_per_device": 0}}, "num_experts_per_device=0"),
        ({"experts": {**FFN, "num_experts_per_device": -2}}, "2 ranks share an expert, of 1"),
        ({"experts": {**FFN, "num_experts_per_device": "2"}}, "is str, expected int"),
        ({"experts": {**FFN, "fused_custom_fn": 1}}, "'fused_custom_fn' any more"),
        ({"experts": {**FFN, "hidden": 1}}, "no option 'hidden'"),
        ({"experts": {**FFN, "activation_fn": 1}}, "activation_fn is int"),
        ({"experts": {**FFN, "activation_fn": F.relu, "activation_fn_with_self": max}}, "both given"),
        ({"parallel_type": "best"}, "parallel_type='best'"),
        ({"a2a_ffn_overlap_degree": 0}, "a2a_ffn_overlap_degree=0"),
        ({"width": 1}, "no argument 'width'"),
    ],
)
def test_refused(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        build(**change)


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        ({"input": torch.ones(6)}, "no dimension is left"),
        ({"input": torch.ones(2, 5)}, r"\(2, 5\), expected model_dim=6"),
        ({"input": [1.0]}, "input is list"),
        ({"gate_index": 1}, "gate_index=1 of 1"),
        ({"adaptive_r": 2}, r"adaptive_r=2 is none of valid_rs=\[0, 1\]"),
        ({"top_k": -1}, "k=-1"),
        ({"capacity_factor": float("inf")}, "factor=inf"),
        ({"a2a_ffn_overlap_degree": 1.5}, "a2a_ffn_overlap_degree=1.5"),
        ({"reserve_dims": 2}, "reserve_dims=2"),
        ({"input": torch.full((2, 6), float("nan"))}, "nan is not a number"),
    ],
)
def test_refused_calls(forward, message):
    with pytest.raises((ValueError, TypeError), match=message):
        build()(**{"input": torch.ones(2, 6), **forward})


class Wrong(nn.Module):
    top_k = 1

    def __init__(self, answer, **sizes):
        super().__init__()
        self.answer = answer

    def forward(self, *given):
        return self.answer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate_type": {"type": "custom", "module": Wrong, "answer": 1}}, "returned int, expected logits"),
        ({"gate_type": {"type": "custom", "module": Wrong, "answer": torch.ones(2, 3)}}, r"expected \[T, E\]=\(2, 2\)"),
        ({"experts": {"type": "custom", "module": Wrong, "answer": torch.ones(2, 6)}}, r"expected \[E, C, ...\]"),
    ],
)
def test_modules_that_answer_something_else(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        build(**change)(torch.ones(2, 6))


def test_a_gate_must_say_how_many():
    layer = build(gate_type={"type": "custom", "module": Wrong, "answer": None})
    layer.gates[0] = nn.Linear(6, 2)
    with pytest.raises(ValueError, match="no attribute top_k"):
        layer(torch.ones(2, 6))
    with pytest.raises(ValueError, match="param_type='all'"):
        layer.get_parameter_iterator("all")


def test_early_ways_to_say_it():
    layer = build(gate_type="Top2Gate", pad_samples=True, experts={**FFN, "count_per_node": 3})
    assert (layer.gates[0].top_k, layer.num_global_experts) == (2, 3)
    assert moe.moe_layer.global_expert_count(1.0) == 1
    assert build(experts={**FFN, "num_experts_per_device": -1}).num_global_experts == 1


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (F.relu, "relu"),
        (torch.relu, "relu"),
        (nn.ReLU(), "relu"),
        (nn.GELU("tanh"), "gelu_tanh"),
        (lambda x: F.silu(x), "silu"),
        (lambda x: torch.nn.functional.gelu(x), "gelu"),
        (lambda x: F.relu(x) * 2, None),
        (lambda x: F.relu(F.relu(x)), None),
        (lambda x, y=1: F.relu(x), None),
        (lambda x: F.gelu(x, approximate="tanh"), None),
        (torch.tanh, None),
        (nn.Tanh(), None),
        (lambda x: nothing.at_all(x), None),  # noqa: F821
    ],
)
def test_activations_that_kernels_know(function, kind):
    assert known_activation(function) == kind


def test_state_dict():
    layer = build()
    names = ["batched_fc1_w", "batched_fc2_w", "batched_fc1_bias", "batched_fc2_bias"]
    expected = ["_num_global_experts", *(f"experts.{name}" for name in names), "gates.0.wg.weight"]
    state = layer.state_dict()
    assert list(state) == expected
    assert [tuple(v.shape) for v in state.values()] == [(), (2, 4, 6), (2, 4, 6), (2, 4), (2, 6), (2, 6)]
    assert state["_num_global_experts"].item() == 2
    other = build()
    other.load_state_dict(state)
    x = torch.randn(5, 6)
    assert torch.equal(layer(x), other(x))


def test_checkpoints_of_other_shapes(caplog):
    layer = nn.Sequential(build())
    state = layer.state_dict()
    state["0.experts.batched_fc1_bias"] = torch.ones(2, 1, 4)
    del state["0._num_global_experts"], state["0.experts.batched_fc2_bias"]
    given = dict(state)
    with caplog.at_level(logging.WARNING, logger="tutelx"):
        layer.load_state_dict(state)
    assert "early version" in caplog.text
    assert "batched_fc2_bias is missing" in caplog.text
    assert state.keys() == given.keys()
    assert layer[0].experts.batched_fc1_bias.eq(1).all()
    del state["0.experts.batched_fc1_w"]
    with pytest.raises(RuntimeError, match="batched_fc1_w"):
        layer.load_state_dict(state)
    state["0._num_global_experts"] = torch.tensor(4)
    with pytest.raises(ValueError, match=r"holds 4 experts at 0\., the layer has 2"):
        layer.load_state_dict(state)
