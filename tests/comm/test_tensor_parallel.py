"""Ranks that hold the same tokens send a share each; outputs and gradients are those of ranks that send all."""

import pytest
import torch
import torch.distributed as dist

from tests.cases import tensor
from tests.tolerance import assert_close
from tutelx import MoE, Plan
from tutelx.gates import TopK

TOKENS = (7, 1)  # of either group: shares of 4 and 3, of 1 and 0


def layer(**where):
    torch.manual_seed(0)
    return MoE(4, 8, 2, gate=TopK(k=2, balance_coef=0.1), bias=True, dtype=torch.float64, **where)


def inputs(pair):
    x = tensor(TOKENS[pair], 4, dtype=torch.float64, seed=pair, grad=True)
    return x, tensor(TOKENS[pair], 4, dtype=torch.float64, seed=5 + pair)


def shared(group, plan):
    rank = dist.get_rank(group)
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    moe = layer(mesh=group, tp_group=pairs[rank // 2])
    x, grad = inputs(rank // 2)
    y = moe(x, plan=plan)
    ((y * grad).sum() + moe.aux_loss).backward()
    tokens = int(moe.stats.tokens_per_expert.sum()) // 2
    return y.detach(), x.grad, {name: p.grad for name, p in moe.named_parameters()}, tokens


@pytest.mark.parametrize("plan", [Plan(), Plan(shard_degree=2, pipeline_degree=2), Plan(shard_degree=0)], ids=str)
def test_shares(ranks, plan):
    answers = ranks(4).run(shared, plan)
    moe = layer()
    experts, total = list(moe.experts.parameters()), 0
    for pair in (0, 1):
        x, grad = inputs(pair)
        y = moe(x)
        loss = (y * grad).sum() + moe.aux_loss
        grad_x, grad_gate = torch.autograd.grad(loss, [x, moe.gate.weight], retain_graph=True)
        total = total + loss
        for rank in (2 * pair, 2 * pair + 1):
            given_y, given_x, gradients, _ = answers[rank]
            assert_close(given_y, y)
            assert_close(given_x, grad_x)
            assert_close(gradients["gate.weight"], grad_gate)
    for (name, _), wanted in zip(moe.experts.named_parameters(), torch.autograd.grad(total, experts)):
        # Two experts on four ranks: halves of expert 0, halves of expert 1.
        dim = 2 if name == "down_proj" else 1
        parts = [gradients[f"experts.{name}"] for _, _, gradients, _ in answers]
        assert_close(torch.cat([torch.cat(parts[:2], dim), torch.cat(parts[2:], dim)]), wanted, what=name)
    assert [tokens for *_, tokens in answers] == [4, 3, 1, 0]


def unequal(group):
    moe = layer(mesh=group, tp_group=group)
    try:
        moe(tensor(5 + dist.get_rank(group), 4, dtype=torch.float64))
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"


def test_different_tokens_in_one_group(ranks):
    assert ranks(2).run(unequal) == ["RankMismatchError: rank 1 has tokens=6, rank 0 has tokens=5"] * 2


def unequal_elsewhere(group):
    """The ranks of the first pair differ, those of the second wait for them."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    rank = dist.get_rank(group)
    moe = layer(mesh=group, tp_group=pairs[rank // 2])
    try:
        moe(tensor(5 + (rank == 1), 4, dtype=torch.float64))
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"


def test_the_rest_of_the_mesh_is_told(ranks):
    answers = ranks(4).run(unequal_elsewhere)
    wrong = "RankMismatchError: rank 1 has tokens=6, rank 0 has tokens=5"
    assert answers[:2] == [wrong] * 2
    told = f"rank 0 failed before the exchange: {wrong}; rank 1 failed before the exchange: {wrong}"
    assert answers[2:] == [f"RankFailedError: {told}"] * 2


def elsewhere(group):
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine = dist.get_rank() // 2
    try:
        layer(mesh=pairs[mine], tp_group=group)
    except ValueError as error:
        return str(error)


def test_a_group_outside_of_the_mesh(ranks):
    assert ranks(4).run(elsewhere)[0] == "tp_group (0, 1, 2, 3) is not part of the mesh (0, 1)"
    with pytest.raises(TypeError, match="mesh is int, expected DeviceMesh, ProcessGroup or None"):
        layer(mesh=3)
