"""Layers that are left alone, and the attribute that is named."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests import models
from tests.wrap.compare import tokens
from tutelx.errors import InvalidValueError
from tutelx.wrapping import WrappedMoE, explain, wrap


def sized(*hidden_dims: int) -> nn.Module:
    layer = models.MoE(num_experts=len(hidden_dims))
    layer.experts = nn.ModuleList(models.SwiGLU(16, hidden) for hidden in hidden_dims)
    return layer


def changed(change, **options) -> nn.Module:
    layer = models.MoE(**options)
    change(layer)
    return layer


def subclass(**methods) -> nn.Module:
    return type("Changed", (models.MoE,), methods)()


def with_forward(forward) -> nn.Module:
    """A layer whose forward is `forward(layer, x, plain)`, plain being the layer's usual one."""
    return subclass(forward=lambda self, x: forward(self, x, lambda x: models.MoE.forward(self, x)))


class Doubled(models.SwiGLU):
    def forward(self, x):
        return 2 * super().forward(x)


class Counting(models.MoE):
    def forward(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(x)


class AuxLoss(models.MoE):
    def forward(self, x):
        self.aux_loss = self.gate(x).square().mean()
        return super().forward(x)


class Listing(models.MoE):
    def forward(self, x):
        self.losses.append(x.mean())
        return super().forward(x)


class TwoInputs(models.MoE):
    def forward(self, x, mask=None):
        return super().forward(x)


class ExtraState(models.MoE):
    def get_extra_state(self):
        return 1

    def set_extra_state(self, state):
        pass


class Capacity(models.MoE):
    """Each expert takes at most three tokens."""

    def combine(self, x, weights, ids):
        weights = weights.clone()
        for e in range(len(self.experts)):
            for token, nth in torch.nonzero(ids == e)[3:].tolist():
                weights[token, nth] = 0
        return super().combine(x, weights, ids)


class Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 4)


def set_child(path: str, child: nn.Module):
    def change(layer: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        setattr(layer.get_submodule(parent), name, child)

    return change


def mixed(layer: nn.Module) -> None:
    layer.experts[2].w2.bfloat16()


def jitter(self, x, plain):
    return plain(x * (1 + 0.01 * torch.rand_like(x)) if self.training else x)


def in_place(self, x, plain):
    return plain(x.mul_(2))


def train_scale(self, x, plain):
    return plain(x) * (2 if self.training else 1)


def fails(self, x, plain):
    raise RuntimeError("needs a GPU")


def learnt(self, x, plain):
    return plain(x) if not torch.is_grad_enabled() else plain(x) * 2


CASES = {
    "unequal shapes": (
        lambda: sized(24, 24, 20),
        "experts.2.w1.weight",
        "(20, 16), `experts.0.w1.weight` has (24, 16)",
    ),
    "unequal kinds": (lambda: changed(set_child("experts.1", models.FFN(16, 24))), "experts.1", "is FFN, experts.0 is"),
    "shared expert": (lambda: changed(set_child("shared_expert", models.SwiGLU(16, 4))), "shared_expert", "is SwiGLU"),
    "norm": (lambda: changed(set_child("norm", nn.LayerNorm(16))), "norm", "is LayerNorm"),
    "second router": (lambda: changed(set_child("noise", nn.Linear(16, 4))), "noise", "is Linear"),
    "dropout": (lambda: changed(set_child("drop", nn.Dropout(0.1))), "drop", "at random (p=0.1)"),
    "expert dropout": (
        lambda: models.MoE(
            expert=lambda m, h: nn.Sequential(nn.Linear(m, h), nn.ReLU(), nn.Dropout(0.5), nn.Linear(h, m))
        ),
        "experts.0.2",
        "at random (p=0.5)",
    ),
    "expert norm": (
        lambda: changed(set_child("experts.3.norm", nn.LayerNorm(16))),
        "experts.3.norm.weight",
        "has shape",
    ),
    "parameter": (
        lambda: changed(lambda layer: setattr(layer, "scale", nn.Parameter(torch.ones(3)))),
        "scale",
        "is a parameter of shape (3,)",
    ),
    "buffer": (
        lambda: changed(lambda layer: layer.register_buffer("bias", torch.zeros(4))),
        "bias",
        "is a buffer of shape (4,)",
    ),
    "expert parameter": (
        lambda: changed(lambda layer: [e.register_parameter("s", nn.Parameter(torch.ones(1))) for e in layer.experts]),
        "experts.0.s",
        "is a parameter",
    ),
    "router of another kind": (
        lambda: changed(set_child("gate", Router())),
        "gate",
        "is Router, expected an nn.Linear",
    ),
    "router of another size": (
        lambda: changed(set_child("gate", nn.Linear(16, 5))),
        "gate",
        "with 5 outputs, expected",
    ),
    "no router": (lambda: changed(lambda layer: delattr(layer, "gate")), "experts", "has no router beside it"),
    "parametrized linear": (
        lambda: changed(lambda layer: nn.utils.parametrizations.weight_norm(layer.experts[0].w1)),
        "experts.0.w1",
        "is ParametrizedLinear, expected a plain nn.Linear",
    ),
    "layer hook": (lambda: changed(lambda layer: layer.register_forward_hook(print)), "_forward_hooks", "holds hooks"),
    "router hook": (
        lambda: changed(lambda layer: layer.gate.register_forward_pre_hook(print)),
        "gate._forward_pre_hooks",
        "holds hooks of Linear",
    ),
    "expert hook": (
        lambda: changed(lambda layer: layer.experts[1].w2.register_full_backward_hook(print)),
        "experts.1.w2._backward_hooks",
        "holds hooks",
    ),
    "patched": (
        lambda: changed(lambda layer: setattr(layer, "forward", lambda x: x)),
        "forward",
        "is replaced on this",
    ),
    "extra state": (ExtraState, "get_extra_state", "overridden"),
    "mixed dtypes": (
        lambda: changed(mixed),
        "experts.2.w2.weight",
        "of torch.bfloat16, `gate.weight` is of torch.float32",
    ),
    "meta device": (lambda: models.MoE().to("meta"), "gate.weight", "is on the meta device"),
    "further argument": (TwoInputs, "forward", "takes `mask` besides the tokens"),
    "one linear": (
        lambda: models.MoE(expert=lambda m, h: nn.Sequential(nn.Linear(m, m))),
        "experts.0",
        "has 1 nn.Linear",
    ),
    "fused": (
        lambda: models.MoE(expert=lambda m, h: nn.Sequential(nn.Linear(m, 2 * h), nn.SiLU(), nn.Linear(h, m))),
        "experts.0",
        "0.weight (48, 16), 2.weight (16, 24)",
    ),
    "other activation": (
        lambda: models.MoE(expert=lambda m, h: models.FFN(m, h, activation=nn.Sigmoid())),
        "experts.0",
        "nor another known network: relative error",
    ),
    "other formula": (lambda: models.MoE(expert=Doubled), "experts.0", "nor another known network: relative error"),
    "one expert differs": (
        lambda: changed(lambda layer: setattr(layer.experts[2].net, "1", nn.ReLU()), expert=models.FFN),
        "experts.2",
        "is not net.2(gelu(net.0(x))) as `experts.0` is",
    ),
    "jitter": (lambda: with_forward(jitter), "forward", "is random in train mode: two runs on one input differ by"),
    "functional dropout": (
        lambda: with_forward(lambda self, x, plain: F.dropout(plain(x), 0.1, self.training)),
        "forward",
        "is random in train mode",
    ),
    "in place": (lambda: with_forward(in_place), "forward", "changes its input in place"),
    "train mode": (lambda: with_forward(train_scale), "forward", "something else in train mode: relative error"),
    "grad mode": (
        lambda: with_forward(learnt),
        "forward",
        "something else where gradients are recorded: relative error",
    ),
    "raises": (lambda: with_forward(fails), "forward", "raises RuntimeError: needs a GPU"),
    "dictionary": (lambda: with_forward(lambda self, x, plain: {"y": plain(x)}), "forward", "returns dict"),
    "tuple": (lambda: with_forward(lambda self, x, plain: (plain(x), x)), "forward", "a tuple whose second item"),
    "three items": (lambda: with_forward(lambda self, x, plain: (plain(x), x, x)), "forward", "returns a tuple of 3"),
    "other shape": (lambda: with_forward(lambda self, x, plain: plain(x).flatten()), "forward", "of shape (128,)"),
    "scaled": (
        lambda: with_forward(lambda self, x, plain: plain(x) * 2.5),
        "forward",
        "is no known routing; the nearest, top-",
    ),
    "residual": (lambda: with_forward(lambda self, x, plain: plain(x) + x), "forward", "is no known routing"),
    "capacity": (Capacity, "forward", "gives 8 equal tokens unequal outputs (a capacity?)"),
    "attribute": (AuxLoss, "aux_loss", "is changed by the forward"),
    "one expert for all": (
        lambda: changed(lambda layer: setattr(layer, "experts", nn.ModuleList([layer.experts[0]] * 4))),
        "forward",
        "the output does not tell",
    ),
    "counter": (Counting, "calls", "is changed by the forward"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_attribute_is_named(case, caplog):
    make, attribute, reason = CASES[case]
    layer = make()
    (report,) = explain(layer)
    assert not report.recognised
    assert report.attribute == attribute
    assert reason in report.reason
    model = models.model(layer)
    with caplog.at_level(logging.WARNING, logger="tutelx"):
        wrap(model)
    assert model[0].moe is layer
    assert f"0.moe ({type(layer).__name__}) is left alone: `{attribute}` {report.reason}" in caplog.text


def test_a_list_that_grows_is_put_back():
    layer = Listing()
    layer.losses = ["first"]
    (report,) = explain(layer)
    assert report.attribute == "losses"
    assert layer.losses == ["first"]


def test_attributes_set_while_probing_are_taken_away():
    layer = AuxLoss()
    explain(layer)
    assert "aux_loss" not in vars(layer)


def test_strict_makes_it_an_error():
    model = models.model(models.MoE(), models.MoE(expert=Doubled))
    with pytest.raises(InvalidValueError, match=r"1\.moe \(MoE\) is left alone: `experts.0` is not"):
        wrap(model, strict=True)
    assert not any(isinstance(module, WrappedMoE) for module in model.modules())


def test_others_are_wrapped_beside_it(caplog):
    model = models.model(models.MoE(expert=Doubled), models.MoE())
    original = copy.deepcopy(model)
    wrap(model)
    assert [isinstance(block.moe, WrappedMoE) for block in model] == [False, True]
    torch.testing.assert_close(model(tokens(5, 16)), original(tokens(5, 16)))
    assert "nothing" not in caplog.text


def test_a_large_layer_is_not_given_other_weights(monkeypatch):
    """Its present weights show nothing, and a second set would not fit in memory beside them."""
    monkeypatch.setattr("tutelx.integrations.recognise._MOST_RANDOM_BYTES", 1000)
    layer = models.MoE()
    with torch.no_grad():
        layer.gate.weight.zero_()
    (report,) = explain(layer)
    assert report.attribute == "gate"
    assert "equal logits to several experts" in report.reason


def test_a_list_of_blocks_is_no_moe_layer():
    class Transformer(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2) for _ in range(3))
            self.head = nn.Linear(8, 3)

    assert explain(Transformer()) == []
