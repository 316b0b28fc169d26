"""Layers of other libraries that are left alone, and what is said about it."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import tutelx
from tests.libraries import standins
from tests.libraries.layers import M, alone, ffn, hierarchy, mixture, st_moe, standin, torchscale
from tutelx.wrapping import explain

pytestmark = pytest.mark.usefixtures(alone.__name__)
__all__ = ["alone"]  # a fixture


def dropping() -> nn.Module:
    return nn.Sequential(nn.Linear(M, 12), nn.ReLU(), nn.Dropout(0.5), nn.Linear(12, M))


class Centred(nn.Module):
    """An expert whose output for a token depends on all of its tokens."""

    def __init__(self):
        super().__init__()
        self.net = ffn()

    def forward(self, x):
        return self.net(x - x.mean(dim=-2, keepdim=True))


def hooked(layer: nn.Module, path: str) -> nn.Module:
    layer.get_submodule(path).register_forward_hook(lambda module, args, out: out)
    return layer


class OtherGate(nn.Module):
    def __init__(self):
        super().__init__()
        self.wg = nn.Linear(M, 4)


def of_another_gate():
    layer = torchscale()
    layer.gate = OtherGate()
    return layer


def zero(layer: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(float("nan"))
    return layer


@pytest.mark.parametrize(
    ("make", "attribute", "reason"),
    [
        (lambda: standin(ep_size=2), "ep_size", "is 2: the library spreads these experts over ranks itself"),
        (lambda: standin(dropping, k=2), "forward", "computes something else: relative error .* in train mode"),
        (lambda: standin(Centred, k=2), "forward", "computes something else: relative error .* in eval mode"),
        (lambda: hooked(standin(), "deepspeed_moe.experts"), "experts._forward_hooks", "holds hooks of DeepSpeedEx"),
        (lambda: hooked(standin(), "deepspeed_moe"), "_forward_hooks", "holds hooks of MOELayer"),
        (lambda: zero(standin()), "forward", "gives values that are not finite"),
        (lambda: st_moe(is_distributed=True), "experts.is_distributed", "spreads these experts over ranks itself"),
        (lambda: mixture(experts=ffn()), "experts", "is Sequential, expected weights w1, w2 and an activation act"),
        (
            lambda: hierarchy(activation=nn.Tanh),
            "experts.act",
            "is none of the activations silu, gelu, gelu_tanh, relu",
        ),
        (lambda: torchscale("Top1Gate", use_xmoe=True), "gate.wg", "is written to by the forward"),
        (of_another_gate, "gate", "is OtherGate, expected Top1Gate or Top2Gate"),
        (
            lambda: standins.Megablocks(dropless=True, moe_expert_model_parallelism=True),
            "args.moe_expert_model_parallelism",
            "spreads the experts over ranks",
        ),
        (
            lambda: standins.Megablocks(dropless=True, activation_fn=torch.tanh),
            "args.activation_fn",
            "is none of the activations",
        ),
    ],
)
def test_left_alone(make, attribute, reason):
    layer = make()
    before = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
    (report,) = explain(layer)
    assert report.attribute == attribute
    assert re.search(reason, report.reason), report.reason
    assert tutelx.wrap(layer) is layer
    with pytest.raises(tutelx.errors.InvalidValueError):
        tutelx.wrap(layer, strict=True)
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter, before[name], equal_nan=True)


def test_what_a_layer_has_said_before_stays():
    """The probe leaves no auxiliary loss of its own behind."""
    layer = standin(k=2)
    layer(torch.randn(3, 4, M))
    loss, counts = layer.deepspeed_moe.l_aux, layer.deepspeed_moe.exp_counts
    tutelx.wrap(layer, strict=True)
    assert layer.deepspeed_moe.l_aux is loss
    assert layer.deepspeed_moe.exp_counts is counts
    saved = list(standins.saved)
    explain(standins.Megablocks(dropless=True))
    assert len(standins.saved) == len(saved), "the probe has filed losses"


def test_experts_that_change_later_are_called():
    layer, written = (standin(k=2) for _ in range(2))
    layer.load_state_dict(written.state_dict())
    tutelx.wrap(layer, strict=True)
    for each in (layer, written):
        expert = each.deepspeed_moe.experts.deepspeed_experts[1]
        expert.register_forward_hook(lambda module, args, out: out * 2)
    x = torch.randn(4, 5, M)
    torch.testing.assert_close(layer(x)[0], written(x)[0])


def test_wrong_input_is_named():
    layer = tutelx.wrap(standin(k=2), strict=True)
    with pytest.raises(
        tutelx.errors.InvalidValueError, match=r"x has shape \(2, 3, 5\), expected \[..., model_dim=8\]"
    ):
        layer.deepspeed_moe(torch.randn(2, 3, 5))
    with pytest.raises(tutelx.errors.InvalidTypeError, match="nothing was given"):
        layer.deepspeed_moe()
    with pytest.raises(tutelx.errors.InvalidTypeError, match="x is list"):
        tutelx.wrap(standins.Megablocks(dropless=True), strict=True).experts(
            [1], None, torch.ones(2, 2), torch.ones(2, 2)
        )
