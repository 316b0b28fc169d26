"""Layers named by flags, files, models and checkpoints."""

import pytest
import torch
from torch import nn

import tutelx
from tests import models
from tutelx.errors import InvalidTypeError, InvalidValueError
from tutelx.tuner import Shape, shapes_of
from tutelx.tuner.models import shapes_of_state
from tutelx.tuner.shapes import shapes_from

SMALL = {"model_dim": 8, "hidden_dim": 16, "num_experts": 4}


@pytest.mark.parametrize("experts", ["gated", "ffn"])
@pytest.mark.parametrize("bias", [False, True])
def test_numbers_of_an_expert_are_those_of_a_layer(experts, bias):
    layer = tutelx.MoE(8, 16, 4, experts=experts, bias=bias, dtype=torch.bfloat16)
    shape = Shape(**SMALL, experts=experts, bias=bias, dtype="bfloat16")
    assert shape.expert_numbers == layer.experts.numbers
    assert shapes_of(layer) == [shape]
    assert shapes_of(nn.Sequential(layer, nn.ModuleList([layer])), dtype="float32") == [shape.in_dtype("float32")]
    assert shapes_of_state(layer.state_dict(), "x") == [shape]


def test_files_by_hand():
    assert shapes_from(SMALL, "f") == [Shape(**SMALL)]
    listed = [SMALL, {**SMALL, "experts": "ffn", "bias": True, "dtype": "bfloat16"}, SMALL]
    expected = [Shape(**SMALL), Shape(**SMALL, experts="ffn", bias=True, dtype="bfloat16")]
    assert shapes_from(listed, "f") == shapes_from({"layers": listed}, "f") == expected


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (None, InvalidTypeError, "f holds NoneType, expected a layer or a list of layers"),
        ([], InvalidTypeError, "f holds list"),
        ([3], InvalidTypeError, "f, layer 0 is int, expected a mapping"),
        ([SMALL, {**SMALL, "colour": 1}], InvalidValueError, "f, layer 1: colour is none of model_dim"),
        ({"model_dim": 3}, InvalidValueError, "f, layer 0: hidden_dim, num_experts is missing"),
        ({**SMALL, "model_dim": 0}, InvalidValueError, "f, layer 0: model_dim=0 is outside"),
        ({**SMALL, "model_dim": "8"}, InvalidTypeError, "model_dim='8' is str, expected int"),
        ({**SMALL, "model_dim": True}, InvalidTypeError, "model_dim=True is bool"),
        ({**SMALL, "dtype": "float8"}, InvalidValueError, "dtype='float8' is none of float32"),
        ({**SMALL, "experts": ["gated"]}, InvalidValueError, "is none of gated, ffn"),
        ({**SMALL, "bias": "no"}, InvalidTypeError, "bias='no' is str, expected bool"),
    ],
)
def test_files_that_are_wrong(value, error, message):
    with pytest.raises(error, match="f") as raised:
        shapes_from(value, "f")
    assert message in str(raised.value)


@pytest.mark.parametrize(("expert", "kind", "bias"), [(models.SwiGLU, "gated", False), (models.FFN, "ffn", True)])
def test_a_hand_written_layer_before_and_after_wrap_and_its_checkpoint(expert, kind, bias):
    model = nn.Sequential(models.MoE(expert=expert))
    shape = Shape(model_dim=16, hidden_dim=24, num_experts=4, experts=kind, bias=bias)
    assert shapes_of_state(model.state_dict(), "x") == [shape]
    assert shapes_of(model) == [shape]
    assert shapes_of(tutelx.wrap(model)) == [shape]


def test_stacked_experts_of_transformers_by_their_names():
    state = {
        "model.layers.0.mlp.experts.gate_up_proj": torch.empty(4, 48, 16),
        "model.layers.0.mlp.experts.down_proj": torch.empty(4, 16, 24),
        "model.layers.1.mlp.experts.gate_up_proj": torch.empty(4, 16, 48),  # transposed
        "model.layers.1.mlp.experts.gate_up_proj_bias": torch.empty(4, 48),
        "model.layers.1.mlp.experts.down_proj": torch.empty(4, 24, 16),
    }
    gated = Shape(model_dim=16, hidden_dim=24, num_experts=4)
    assert shapes_of_state(state, "x") == [gated, Shape(model_dim=16, hidden_dim=24, num_experts=4, bias=True)]


def test_models_without_a_layer():
    with pytest.raises(InvalidTypeError, match="module is int, expected"):
        shapes_of(3)
    with pytest.raises(InvalidValueError, match="Linear has no MoE layer that can be tuned: nothing in it looks like"):
        shapes_of(nn.Linear(2, 2))
    custom = tutelx.MoE(8, 1, 2, experts=nn.ModuleList(nn.Linear(8, 8) for _ in range(2)))
    with pytest.raises(InvalidValueError, match="MoE has no MoE layer that can be tuned"):
        shapes_of(custom)
    with pytest.raises(InvalidValueError, match="'x' holds no experts"):
        shapes_of_state({"weight": torch.empty(2, 2)}, "'x'")
