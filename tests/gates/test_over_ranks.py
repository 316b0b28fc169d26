"""Losses and bias updates over two ranks against one process that holds all tokens."""

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from tests.cases import tensor
from tests.gates.hand import F64
from tests.tolerance import assert_close
from tutelx import MoE, gates, ops
from tutelx.gates import losses

SPLIT = (0, 5, 12)  # uneven: tokens of rank 0, then of rank 1
CONFIG = {
    "NoisyTopK": lambda group: gates.NoisyTopK(group=group),
    "Hierarchical": lambda group: gates.Hierarchical(num_groups=2, group=group),
}


def all_losses(x, weight, group=None):
    logits = x @ weight.T
    gated = ops.gate(logits, 2)
    ids, total = gated.expert_ids, gated.score_sum
    std = torch.full_like(logits, 0.5)
    return torch.stack(
        [
            losses.importance(ids, gated.weights, 4, group=group),
            losses.load(logits, logits + 0.1 * logits.sin(), std, 2, group=group),
            losses.switch_balance(ids, total, group=group),
            losses.gshard_balance(ids, total, group=group),
            losses.router_z(gated.logsumexp, group=group),
            losses.expert_balance(ids, total, group=group),
            losses.device_balance(ids, total, 2, group=group),
            losses.communication_balance(ids, total, 2, 1, group=group),
        ]
    )


def tokens(rank):
    return tensor(12, 6, dtype=F64)[SPLIT[rank] : SPLIT[rank + 1]]


def losses_of_a_rank(group):
    weight = tensor(4, 6, dtype=F64, seed=1, grad=True)
    values = all_losses(tokens(group.rank()), weight, group)
    grads = [torch.autograd.grad(value, weight, retain_graph=True)[0] for value in values]
    return values.detach(), torch.stack(grads)


def test_losses_are_those_of_all_tokens(ranks):
    weight = tensor(4, 6, dtype=F64, seed=1, grad=True)
    expected = all_losses(tensor(12, 6, dtype=F64), weight)
    wanted = torch.stack([torch.autograd.grad(value, weight, retain_graph=True)[0] for value in expected])
    answers = ranks(2).run(losses_of_a_rank)
    for values, _ in answers:
        assert_close(values, expected.detach())
    # The average over ranks, as DistributedDataParallel takes it.
    assert_close((answers[0][1] + answers[1][1]) / 2, wanted)


def train_a_layer(group, name):
    layer = MoE(6, 8, 4, gate=CONFIG[name](group), dtype=F64)
    layer.gate.draws.normal = lambda shape, like: torch.zeros(shape, dtype=F64)
    model = DistributedDataParallel(layer, process_group=group)
    model(tokens(group.rank())).sum().backward(retain_graph=True)
    model.zero_grad()
    layer.aux_loss.backward()
    return layer.aux_loss.item()


@pytest.mark.parametrize("name", list(CONFIG))
def test_gates_with_a_group(ranks, name):
    torch.manual_seed(0)
    layer = MoE(6, 8, 4, gate=CONFIG[name](None), dtype=F64)
    layer.gate.draws.normal = lambda shape, like: torch.zeros(shape, dtype=F64)
    layer(tensor(12, 6, dtype=F64))
    assert ranks(2).run(train_a_layer, name) == pytest.approx([layer.aux_loss.item()] * 2)


def update_a_bias(group):
    gate = gates.BiasBalanced(k=2, gamma=0.5).build(6, 4, dtype=F64)
    with torch.no_grad():
        gate.weight.copy_(tensor(4, 6, dtype=F64, seed=1))
    gate(tokens(group.rank()))
    gate.update_bias(group)
    return gate.bias_correction


def test_the_bias_follows_the_load_of_all_ranks(ranks):
    gate = gates.BiasBalanced(k=2, gamma=0.5).build(6, 4, dtype=F64)
    with torch.no_grad():
        gate.weight.copy_(tensor(4, 6, dtype=F64, seed=1))
    gate(tensor(12, 6, dtype=F64))
    gate.update_bias()
    assert gate.bias_correction.any()
    for answer in ranks(2).run(update_a_bias):
        assert torch.equal(answer, gate.bias_correction)
