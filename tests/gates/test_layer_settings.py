"""Capacity of training and evaluation, and batch-prioritised routing, as settings of the layer."""

import math

import pytest
import torch

from tests.cases import tensor
from tutelx import Capacity, MoE, Plan
from tutelx.gates import TopK


def steered(num_experts=2, **arguments) -> MoE:
    """Its logits are the first E entries of a token."""
    layer = MoE(4, 8, num_experts, dtype=torch.float64, **arguments)
    with torch.no_grad():
        layer.gate.weight.copy_(torch.eye(4, dtype=torch.float64)[:num_experts])
    return layer


def got_a_row(y):
    return (y.abs().sum(dim=1) > 0).tolist()


def test_capacity_of_training_and_evaluation():
    layer = steered(gate=TopK(k=1), capacity=Capacity.fixed(0.5), eval_capacity=Capacity.fixed(2.0))
    x = torch.zeros(8, 4, dtype=torch.float64)
    x[:, 0] = 1  # all eight want expert 0, which takes 0.5 * 8 / 2 = 2, and 2 * 8 / 2 = 8 in evaluation
    assert sum(got_a_row(layer(x))) == 2
    assert sum(got_a_row(layer(x, capacity=Capacity.fixed(1.0)))) == 4
    layer.eval()
    assert sum(got_a_row(layer(x))) == 8
    layer.eval_capacity = None
    assert sum(got_a_row(layer(x))) == 2


@pytest.mark.parametrize("plan", [None, Plan(), Plan(layout="padded")], ids=str)
def test_the_greatest_gate_values_keep_their_rows(plan):
    # All want expert 0, with logit differences 1, 3, 2, 3: probabilities of token 1 and 3 are the greatest, and a
    # normalised top-1 weight, which is 1 for everybody, would not tell them apart.
    x = torch.zeros(4, 4, dtype=torch.float64)
    x[:, 0] = torch.tensor([1.0, 3, 2, 3])
    layer = steered(gate=TopK(k=1), capacity=Capacity.fixed(1.0), batch_prioritized=True)  # 1 * 4 / 2 = 2 rows
    assert got_a_row(layer(x, plan=plan)) == [False, True, False, True]
    assert got_a_row(layer(x, plan=plan, capacity=Capacity.fixed(0.5))) == [False, True, False, False]
    layer.batch_prioritized = False
    assert got_a_row(layer(x, plan=plan)) == [True, True, False, False]


def test_all_first_choices_come_before_any_second_choice():
    # K = 2 of E = 2 with room for 2: token 0 is the surest (its second choice, expert 1, comes late all the same),
    # and the first choices of tokens 1 and 2 fill expert 1.
    x = torch.tensor([[9.0, 0, 0, 0], [0, 1, 0, 0], [0, 2, 0, 0]], dtype=torch.float64)
    layer = steered(gate=TopK(k=2), capacity=Capacity.fixed(2 / 3), batch_prioritized=True)
    layer(x)
    assert layer.stats.tokens_per_expert.tolist() == [3, 3]
    assert layer.stats.received_per_expert.tolist() == [2, 2]
    weights = layer.gate(x).weights
    with torch.no_grad():
        alone = steered(gate=TopK(k=1))
        alone.load_state_dict(layer.state_dict())
        assert torch.allclose(layer(x)[0], alone(x)[0] * weights[0, 0])


def test_priority_is_the_top_probability_not_the_top_logit():
    # Logits (5, 5): p = 1/2. Logits (1, -3): p = 1/(1+e^-4) = 0.98.
    x = torch.tensor([[5.0, 5, 0, 0], [1, -3, 0, 0]], dtype=torch.float64)
    layer = steered(gate=TopK(k=1), capacity=Capacity.fixed(1.0), batch_prioritized=True)
    assert got_a_row(layer(x)) == [False, True]
    priority = layer.gate(x, prioritized=True).priority
    assert priority.exp().tolist() == pytest.approx([0.5, 1 / (1 + math.exp(-4))])


def test_no_drop_no_difference():
    x = tensor(20, 4, dtype=torch.float64)
    layer = steered(gate=TopK(k=2))
    y = layer(x)
    layer.batch_prioritized = True
    assert torch.allclose(layer(x), y, rtol=1e-12, atol=1e-14)


def test_bad_settings():
    with pytest.raises(TypeError, match=r"eval_capacity is float, expected tutelx.Capacity"):
        MoE(4, 8, 2, eval_capacity=1.0)
