"""Shared experts, residual layers, expert dropout and freezing."""

import math

import pytest
import torch
from torch import nn

from tests.cases import tensor
from tests.gates.hand import F64
from tests.tolerance import assert_close
from tutelx import Capacity, MoE, ResidualMoE, SharedExperts, structure, wrap
from tutelx.base import MoEBase
from tutelx.gates import TopK


def moe(**arguments):
    return MoE(6, 8, 4, gate=TopK(k=2, normalize=False), dtype=F64, **arguments)


def linear(*sizes):
    return nn.Linear(*sizes, dtype=F64)


def test_shared_experts_are_added():
    layer, shared = moe(), linear(6, 6)
    x = tensor(2, 5, 6, dtype=F64)
    both = SharedExperts(layer, shared)
    assert_close(both(x), layer(x) + shared(x))
    assert_close(both(x, top_k=4, capacity=Capacity.fixed(9.0)), layer(x, top_k=4) + shared(x))
    assert both.aux_loss is layer.aux_loss
    assert both.stats is layer.stats
    assert both.last_decision is layer.last_decision


def test_shared_experts_behind_a_gate():
    layer, shared = moe(), linear(6, 6)
    both = SharedExperts(layer, shared, gated=True)
    x = tensor(5, 6, dtype=F64)
    # A gate of 0 gives sigmoid(0) = 1/2.
    with torch.no_grad():
        both.shared_gate.weight.zero_()
    assert_close(both(x), layer(x) + shared(x) / 2)
    with torch.no_grad():
        both.shared_gate.weight.fill_(0.3)
    assert_close(both(x), layer(x) + torch.sigmoid(0.3 * x.sum(1, keepdim=True)) * shared(x))


def test_residual():
    layer, mlp = MoE(6, 8, 4, gate=TopK(k=1), dtype=F64), linear(6, 6)
    x = tensor(3, 4, 6, dtype=F64)
    assert_close(ResidualMoE(layer, mlp)(x), mlp(x) + layer(x))
    weighted = ResidualMoE(layer, mlp, coefficient=True)
    # softmax of (ln 3, 0) is (3/4, 1/4) for tokens whose first entry is 1.
    with torch.no_grad():
        weighted.coefficient.weight.copy_(torch.eye(2, 6) * torch.tensor([[math.log(3)], [0.0]], dtype=F64))
    x = torch.cat([torch.ones(3, 4, 1, dtype=F64), x[..., 1:]], dim=-1)
    assert_close(weighted(x), 0.75 * mlp(x) + 0.25 * layer(x))


def test_wrong_parts():
    with pytest.raises(TypeError, match=r"moe is Linear, expected tutelx.MoE"):
        SharedExperts(linear(6, 6), linear(6, 6))
    with pytest.raises(TypeError, match="mlp is int, expected a module"):
        ResidualMoE(moe(), 5)


@pytest.mark.parametrize("experts", ["gated", "ffn"])
@pytest.mark.parametrize("bias", [True, False])
def test_expert_dropout(experts, bias):
    plain = moe(experts=experts, bias=bias)
    dropping = moe(experts=experts, bias=bias, expert_dropout=0.4, generator=torch.Generator().manual_seed(3))
    dropping.load_state_dict(plain.state_dict(), strict=False)
    x = tensor(7, 6, dtype=F64, grad=True)
    first, second = dropping(x), dropping(x)
    assert not torch.equal(first, second)
    assert_close(dropping.eval()(x), plain(x))
    # The same with nothing dropped and with everything kept.
    dropping.train()
    dropping.experts.draws.uniform = lambda shape, like: torch.ones(shape, dtype=F64)
    dropping.experts.p = 1e-300
    assert_close(dropping(x), plain(x))
    given = torch.autograd.grad(dropping(x).square().sum(), [x, *(p for _, p in dropping.named_parameters())])
    wanted = torch.autograd.grad(plain(x).square().sum(), [x, *(p for _, p in plain.named_parameters())])
    for one, other in zip(given, wanted):
        assert_close(one, other)


def test_expert_dropout_by_hand():
    # One expert, relu, weights 1: hidden (3, 3); the second dropped, the first over 1 - 0.5: 6.
    layer = MoE(1, 2, 1, gate=TopK(k=1), experts="ffn", activation="relu", expert_dropout=0.5, dtype=F64)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(1.0)
    layer.experts.draws.uniform = lambda shape, like: torch.tensor([[0.7, 0.2]], dtype=F64).expand(shape)
    assert layer(torch.full((1, 1), 3.0, dtype=F64)).item() == 6.0


def test_expert_dropout_is_saved_and_resumed():
    x = tensor(7, 6, dtype=F64)
    layer = moe(expert_dropout=0.4, generator=torch.Generator().manual_seed(3))
    layer(x)
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    expected = layer(x)
    resumed = moe(expert_dropout=0.4, generator=torch.Generator())
    resumed.load_state_dict(state)
    assert torch.equal(resumed(x), expected)


def test_expert_dropout_bad_values():
    with pytest.raises(ValueError, match=r"expert_dropout=1.0 is outside \[0, 1\)"):
        moe(expert_dropout=1.0)
    with pytest.raises(ValueError, match=r"expert_dropout=0.1 is for built-in experts"):
        moe(expert_dropout=0.1, experts=nn.ModuleList(linear(6, 6) for _ in range(4)))


def model():
    return nn.Sequential(linear(6, 6), SharedExperts(moe(), linear(6, 6)), linear(6, 6), moe())


def test_freezing():
    net = model()
    frozen = structure.freeze_moe(net)
    assert {name.split(".")[0] for name in frozen} == {"1", "3"}
    assert [name for name, p in net.named_parameters() if p.requires_grad] == [
        "0.weight",
        "0.bias",
        "2.weight",
        "2.bias",
    ]
    before = {name: p.clone() for name, p in net.named_parameters()}
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    net(tensor(5, 6, dtype=F64)).square().sum().backward()
    optimizer.step()
    assert {n for n, p in net.named_parameters() if not torch.equal(p, before[n])} == set(before) - set(frozen)
    learning = structure.train_only_moe(net)
    assert learning == frozen
    assert [name for name, p in net.named_parameters() if not p.requires_grad] == [
        "0.weight",
        "0.bias",
        "2.weight",
        "2.bias",
    ]
    assert structure.freeze_moe(nn.Linear(2, 2)) == []
    assert len(structure.freeze_moe(moe())) == 4, "a model that is an MoE layer itself"


def test_aux_loss_of_a_model():
    net = model()
    net(tensor(5, 6, dtype=F64))
    layers = [layer for _, layer in structure.moe_layers(net)]
    assert len(layers) == 2
    assert all(isinstance(layer, MoEBase) for layer in layers)
    assert structure.aux_loss(net).item() == pytest.approx(sum(layer.aux_loss.item() for layer in layers))
    assert structure.aux_loss(nn.Linear(2, 2)).item() == 0


def test_wrap_leaves_them_alone():
    net = model()
    assert wrap(net)[3] is net[3]
