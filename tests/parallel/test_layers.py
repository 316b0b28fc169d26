"""tutelx.MoE over ranks inside of data parallelism, and its checkpoints, against one process."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor

import tutelx
from tests.parallel.test_averaging import groups
from tests.tolerance import assert_close
from tutelx.comm.shards import shards_of

M, H, TOKENS = 4, 6, 5


def build(mesh, experts: int) -> nn.Module:
    torch.manual_seed(3)
    gate = tutelx.gates.TopK(k=1)
    layer = tutelx.MoE(M, H, experts, gate=gate, experts="ffn", bias=True, mesh=mesh, dtype=torch.float64)
    return nn.Sequential(nn.Linear(M, M, dtype=torch.float64), layer)


def loss_of(model: nn.Module, rank: int) -> torch.Tensor:
    x = torch.randn(TOKENS, M, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    return (model(x) ** 2).sum()


def trained(group, experts, columns):
    spread, replicas = groups(group, columns)
    model = build(spread, experts)
    wrapped = tutelx.parallel.data_parallel(model, group=group, replicas=replicas)
    loss_of(wrapped, dist.get_rank(group)).backward()
    norm = tutelx.parallel.clip_grad_norm_(wrapped, 0.1)
    shards = shards_of(model)
    gradients = {}
    for name, parameter in model.named_parameters():
        gradient = shards[name].whole(parameter.grad) if name in shards else parameter.grad
        gradients[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    full = get_model_state_dict(wrapped, options=StateDictOptions(full_state_dict=True))
    return norm, gradients, full


@pytest.mark.parametrize(
    ("experts", "columns", "members"),
    [(2, None, None), (6, None, None), (4, 2, None), (1, 2, None), (4, None, (1, 3))],
    ids=["sliced", "uneven", "inside two nodes", "sliced inside two nodes", "not the world"],
)
def test_data_parallel_and_clipping(ranks, experts, columns, members):
    world = 4 if members is None else len(members)
    expected = build(None, experts)
    weights = {name: value.clone() for name, value in expected.state_dict().items()}
    (sum(loss_of(expected, rank) for rank in range(world)) / world).backward()
    norm = torch.nn.utils.clip_grad_norm_(expected.parameters(), 0.1)
    for given, gradients, full in ranks(4).run(trained, experts, columns, ranks=members):
        assert_close(given, norm)
        for name, parameter in expected.named_parameters():
            assert_close(gradients[name], parameter.grad, what=name)
        assert full.keys() == weights.keys()
        for name, value in weights.items():
            assert torch.equal(full[name], value), name


def save(group, experts, folder):
    dcp.save(build(group, experts).state_dict(), checkpoint_id=folder, process_group=group)


def load(group, experts, folder):
    model = build(group, experts)
    wanted = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    state = model.state_dict()
    dcp.load(state, checkpoint_id=folder, process_group=group)
    model.load_state_dict(state)
    return all(torch.equal(parameter, wanted[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("experts", [1, 6])
def test_a_checkpoint_of_two_ranks_on_one_three_and_four(ranks, tmp_path, experts):
    ranks(4).run(save, experts, str(tmp_path), ranks=(0, 1))
    assert load(None, experts, str(tmp_path))
    for members in [(0, 1, 2), (0, 1, 2, 3)]:
        assert all(ranks(4).run(load, experts, str(tmp_path), ranks=members))
