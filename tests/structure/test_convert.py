"""A dense model becomes an MoE model: which layers, how many experts, and the same first output when upcycled."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.cases import tensor
from tests.gates.hand import F64
from tests.tolerance import assert_close
from tutelx import Capacity, MoE, convert_dense
from tutelx.gates import STMoE, Switch, TopK


class Mlp(nn.Module):
    def __init__(self, dim, hidden, bias=True, dropout=0.0, activation=None):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden, bias=bias), nn.Linear(hidden, dim, bias=bias)
        self.activation, self.dropout = activation or nn.GELU(), nn.Dropout(dropout)

    def forward(self, x):
        return self.fc2(self.dropout(self.activation(self.fc1(x))))


class SwiGlu(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.a, self.b = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.c = nn.Linear(hidden, dim, bias=False)

    def forward(self, x):
        return self.c(F.silu(self.b(x)) * self.a(x))


class Block(nn.Module):
    """Something like attention of two Linear, and a feed-forward network."""

    def __init__(self, dim, network):
        super().__init__()
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.norm, self.mlp = nn.LayerNorm(dim), network

    def forward(self, x):
        x = x + self.out(self.qkv(x).chunk(3, dim=-1)[0])
        return x + self.mlp(self.norm(x))


def dense(depth=4, make=lambda: Mlp(8, 16)):
    torch.manual_seed(0)
    return nn.Sequential(*(Block(8, make()) for _ in range(depth)), nn.Linear(8, 3)).double()


def converted(model):
    return [isinstance(block.mlp, MoE) for block in list(model)[:-1]]


NETWORKS = {
    "mlp": lambda: Mlp(8, 16),
    "relu": lambda: Mlp(8, 16, bias=False, activation=nn.ReLU()),
    "swiglu": lambda: SwiGlu(8, 12),
    "sequential": lambda: nn.Sequential(nn.Linear(8, 16), nn.GELU(approximate="tanh"), nn.Linear(16, 8)),
    "with dropout": lambda: Mlp(8, 16, dropout=0.5),
    "one bias": lambda: nn.Sequential(nn.Linear(8, 16, bias=False), nn.ReLU(), nn.Linear(16, 8)),
}


@pytest.mark.parametrize("make", list(NETWORKS.values()), ids=list(NETWORKS))
@pytest.mark.parametrize("gate", [TopK(k=2), TopK(k=1), STMoE(second="always", second_in_evaluation="always")], ids=str)
def test_an_upcycled_model_says_the_same_at_first(make, gate):
    model = dense(2, make).eval()
    x = tensor(3, 5, 8, dtype=F64)
    expected = model(x)
    twin = convert_dense(copy.deepcopy(model), 4, every=1, gate=gate, upcycle=True)
    assert converted(twin) == [True, True]
    assert_close(twin(x), expected)


def test_dropout_in_training_does_not_hide_a_network():
    model = dense(2, NETWORKS["with dropout"]).train()
    old = model[0].mlp
    assert converted(convert_dense(model, 4, every=1)) == [True, True]
    assert model[0].mlp.training
    assert old.dropout.training
    assert not convert_dense(dense(1).eval(), 4, every=1)[0].mlp.training


def test_without_upcycling_it_starts_anew():
    model = dense(2)
    x = tensor(3, 8, dtype=F64)
    expected = model(x)
    assert not torch.allclose(convert_dense(model, 4, every=1)(x), expected)


@pytest.mark.parametrize(
    ("every", "wanted"), [(1, [1, 1, 1, 1]), (2, [0, 1, 0, 1]), (3, [0, 0, 1, 0]), (4, [0, 0, 0, 1])]
)
def test_every_so_many(every, wanted):
    assert converted(convert_dense(dense(), 4, every=every)) == [bool(each) for each in wanted]


def test_a_pyramid_has_more_experts_later():
    model = convert_dense(dense(), [2, 8], gate=TopK(k=2))
    assert [block.mlp.num_experts for block in (model[1], model[3])] == [2, 8]
    assert model(tensor(3, 8, dtype=F64)).shape == (3, 3)


def test_settings_reach_the_layers():
    model = convert_dense(
        dense(),
        4,
        gate=Switch(),
        expert_dropout=0.4,
        capacity=Capacity.fixed(1.0),
        eval_capacity=Capacity.fixed(2.0),
        batch_prioritized=True,
        layers=lambda name, module: not name.startswith("3"),
    )
    assert converted(model) == [False, True, False, False]
    layer = model[1].mlp
    assert (layer.experts.p, layer.capacity, layer.eval_capacity, layer.batch_prioritized) == (
        0.4,
        Capacity.fixed(1.0),
        Capacity.fixed(2.0),
        True,
    )
    assert layer.experts.up_bias.dtype == F64


def test_a_model_that_is_a_network_itself():
    network = Mlp(8, 16).double()
    layer = convert_dense(network, 3, every=1, upcycle=True)
    assert isinstance(layer, MoE)
    x = tensor(3, 8, dtype=F64)
    assert_close(layer(x), network(x))


def test_an_moe_model_is_not_converted_again():
    model = convert_dense(dense(2), 4, every=1)
    with pytest.raises(ValueError, match="the model has 0 feed-forward networks to convert, every=1"):
        convert_dense(model, 4, every=1)


def test_what_is_wrong_leaves_the_model_as_it_was():
    model = dense()
    with pytest.raises(ValueError, match=r"num_experts has 3 entries for 2 layers: 1.mlp, 3.mlp"):
        convert_dense(model, [2, 4, 8])
    with pytest.raises(ValueError, match="k=3 exceeds num_experts=2"):
        convert_dense(model, [4, 2], gate=TopK(k=3))
    with pytest.raises(ValueError, match="every=0 must be an int of at least 1"):
        convert_dense(model, 4, every=0)
    with pytest.raises(ValueError, match="the model has 4 feed-forward networks to convert, every=9"):
        convert_dense(model, 4, every=9)
    with pytest.raises(TypeError, match="model is str, expected a module"):
        convert_dense("model", 4)
    assert converted(model) == [False] * 4


def test_it_trains():
    model = convert_dense(dense(2), 4, every=1, upcycle=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    x, y = tensor(64, 8, dtype=F64), tensor(64, 3, dtype=F64, seed=1)
    curve = []
    for _ in range(20):
        loss = F.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    assert curve[-1] < 0.7 * curve[0]
    first = model[0].mlp.experts.up_proj
    assert not torch.equal(first[0], first[1]), "copies part as soon as they see different tokens"
