"""Losses and bias updates over two ranks against one process that holds all tokens."""

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from tests.cases import tensor
from tests.gates.hand import F64
from tests.tolerance import assert_close
from tutelx import Capacity, MoE, gates, ops
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


SHARED = {
    "TopK": gates.TopK(),
    "NoisyTopK": gates.NoisyTopK(),
    "GShardTop2": gates.GShardTop2(group_size=3, second="always"),
    "Switch": gates.Switch(jitter=0.0, reroute=3),
    "STMoE": gates.STMoE(second="always"),
    "Cosine": gates.Cosine(dim=5),
    "ExpertChoice": gates.ExpertChoice(),
    "GroupLimited": gates.GroupLimited(k=2, num_groups=2, kept_groups=1),
    "BiasBalanced": gates.BiasBalanced(k=2),
    "TopP": gates.TopP(p=0.6, k=3),
    "Hierarchical": gates.Hierarchical(num_groups=2, kept_groups=1),
}


def whole_layer(name, **arguments):
    torch.manual_seed(0)
    layer = MoE(6, 8, 4, gate=SHARED[name], batch_prioritized=True, dtype=F64, **arguments)
    with torch.no_grad():
        for i, parameter in enumerate(layer.gate.parameters()):
            parameter.copy_(tensor(*parameter.shape, seed=i) if parameter.numel() > 1 else parameter)
    if name == "NoisyTopK":
        layer.gate.draws.normal = lambda shape, like: torch.zeros(shape, dtype=F64)
    return layer


def run_whole(rank, name, capacity, split):
    layer = whole_layer(name, capacity=capacity)
    return layer(tensor(12, 6, dtype=F64)[split[rank] : split[rank + 1]]).detach()


def run_shared(group, capacity, split):
    """Each gate on a layer whose four experts lie on two ranks."""
    found = {}
    for name in SHARED:
        whole, layer = whole_layer(name), whole_layer(name, capacity=capacity, mesh=group)
        layer.gate.load_state_dict(whole.gate.state_dict())
        with torch.no_grad():
            for part, parameter in layer.experts.named_parameters():
                own = slice(2 * group.rank(), 2 * group.rank() + 2)
                parameter.copy_(whole.experts.get_parameter(part)[own])
        found[name] = layer(tensor(12, 6, dtype=F64)[split[group.rank()] : split[group.rank() + 1]]).detach()
    return found


@pytest.mark.parametrize(
    ("capacity", "split"),
    [(Capacity.dropless(), (0, 5, 12)), (Capacity.dropless(), (0, 12, 12)), (Capacity.fixed(0.6), (0, 6, 12))],
    ids=str,
)
def test_every_gate_with_experts_on_two_ranks(ranks, capacity, split):
    answers = ranks(2).run(run_shared, capacity, split)
    for rank, found in enumerate(answers):
        for name, y in found.items():
            assert_close(y, run_whole(rank, name, capacity, split), what=name)


def test_a_capacity_of_the_gate_holds_for_each_rank(ranks):
    """Gates that drop by themselves do so by the tokens of their own rank, however many the other has."""
    split = (0, 4, 12)
    answers = ranks(2).run(run_shared, Capacity.fixed(0.6), split)
    for rank, found in enumerate(answers):
        for name in ("GShardTop2", "Switch", "ExpertChoice"):
            assert_close(found[name], run_whole(rank, name, Capacity.fixed(0.6), split), what=name)
