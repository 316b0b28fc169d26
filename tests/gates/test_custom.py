"""A module of anybody's as a gate: it returns logits or a Routing."""

import pytest
import torch
from torch import nn

from tests.cases import tensor
from tests.tolerance import assert_close
from tutelx import Capacity, MoE, Routing, errors
from tutelx.gates import TopK, build_gate


class ReturnsRouting(nn.Module):
    """Token t goes to experts t mod E and, if asked for two, to the next."""

    def __init__(self, num_experts, **changes):
        super().__init__()
        self.num_experts, self.changes, self.seen = num_experts, changes, None

    def forward(self, x, top_k=None, capacity=None):
        self.seen = top_k, capacity
        first = torch.arange(len(x)).unsqueeze(1) % self.num_experts
        ids = torch.cat([(first + i) % self.num_experts for i in range(top_k or 1)], dim=1).int()
        fields = {"expert_ids": ids, "weights": torch.full(ids.shape, 0.5), **self.changes}
        return Routing(**fields)


class Plain(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return self.value(x)


def test_a_module_that_returns_logits_is_a_normalised_top_2_gate():
    router = nn.Linear(6, 4, bias=False)
    theirs, ours = MoE(6, 8, 4, gate=router), MoE(6, 8, 4, gate=TopK(k=2))
    ours.load_state_dict({n.replace("gate.module.", "gate."): v for n, v in theirs.state_dict().items()})
    x = tensor(9, 6)
    assert torch.equal(theirs(x), ours(x))
    assert torch.equal(theirs(x, top_k=3), ours(x, top_k=3))
    assert MoE(6, 8, 1, gate=nn.Linear(6, 1))(x).shape == x.shape


def test_a_module_that_returns_a_routing_is_told_what_it_asks_for():
    gate = ReturnsRouting(3)
    layer = MoE(6, 8, 3, gate=gate)
    layer(tensor(7, 6))
    assert layer.stats.tokens_per_expert.tolist() == [3, 2, 2]
    layer(tensor(7, 6), top_k=2, capacity=Capacity.fixed(2.0))
    assert gate.seen == (2, Capacity.fixed(2.0))
    assert int(layer.stats.tokens_per_expert.sum()) == 14


def test_a_gate_that_is_built_already_stays_itself():
    gate = TopK().build(6, 4)
    assert build_gate(gate, 6, 4) is gate


@pytest.mark.parametrize(
    ("gate", "call", "error", "message"),
    [
        ("topk", {}, TypeError, "gate is str, expected a configuration with build"),
        (Plain(lambda x: None), {}, TypeError, "Plain returned NoneType, expected logits or a tutelx.Routing"),
        (Plain(lambda x: x), {}, ValueError, r"the gate returned logits \(5, 6\), expected \[T, E\]=\(5, 4\)"),
        (Plain(ReturnsRouting(4)), {"top_k": 2}, ValueError, "top_k=2 was given, but Plain.forward has no argument"),
        (ReturnsRouting(4, weights=torch.ones(5, 3)), {}, ValueError, r"weights \(5, 3\) for expert_ids \(5, 1\)"),
        (ReturnsRouting(4, expert_ids=torch.zeros(4, 1)), {}, ValueError, r"expert_ids \(4, 1\), expected \[T=5, K\]"),
        (ReturnsRouting(4, expert_ids=torch.full((5, 1), 4)), {}, ValueError, r"expert_ids\[0,0\]=4 is outside"),
        (Plain(lambda x: x[:, :4] * torch.nan), {}, ValueError, r"logits\[0,0\]=-?nan"),
    ],
)
def test_what_cannot_be_used_is_named(gate, call, error, message):
    with pytest.raises(error, match=message) as caught:
        MoE(6, 8, 4, gate=gate)(tensor(5, 6), **call)
    assert isinstance(caught.value, (errors.TutelxError, ValueError))


def test_priority_falls_back_to_the_greatest_weight():
    # One expert with room for ceil(0.5 * 3) = 2 tokens: those with weights 0.9 and 0.4.
    routing = {"expert_ids": torch.zeros(3, 1).int(), "weights": torch.tensor([[0.4], [0.1], [0.9]])}
    layer = MoE(6, 8, 1, gate=ReturnsRouting(1, **routing), capacity=Capacity.fixed(0.5), batch_prioritized=True)
    y = layer(tensor(3, 6))
    assert (y.abs().sum(1) > 0).tolist() == [True, False, True]
    assert_close(y, layer(tensor(3, 6), capacity=Capacity.dropless()) * torch.tensor([[1.0], [0.0], [1.0]]))
