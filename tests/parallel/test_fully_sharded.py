"""FSDP2 around a model with a layer whose experts are spread over the same ranks, against one process."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from tests.cases import tensor
from tests.comm.cases import Case
from tests.tolerance import assert_close
from tutelx import Plan, parallel
from tutelx.comm.shards import shards_of
from tutelx.planner import FixedPlanner

WORLD = 2
M = 4  # as the layer of a Case


class Block(nn.Module):
    """Linear, MoE, Linear; `again` runs the layer a second time in the backward pass."""

    def __init__(self, case: Case, again: bool = False, **where) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.before = nn.Linear(M, M, dtype=case.dtype)
        self.after = nn.Linear(M, 3, dtype=case.dtype)
        self.moe = case.layer(**where)
        self.again = again

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.before(x)
        y = checkpoint(self.moe, x, use_reentrant=False) if self.again else self.moe(x)
        return self.after(x + y)


def losses(model: nn.Module, case: Case, rank: int) -> torch.Tensor:
    return (model(tensor(case.tokens[rank], M, dtype=case.dtype, seed=rank)) ** 2).sum()


def steps(model: nn.Module, loss, count: int) -> None:
    # Unlike Adam's, its steps grow with the gradients.
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    for _ in range(count):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def whole(model: nn.Module) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Every parameter and its gradient, of all experts, by name."""

    def gathered(name: str, value: torch.Tensor) -> torch.Tensor:
        value = shards[name].whole(value) if name in shards else value
        return value.full_tensor() if isinstance(value, dist.tensor.DTensor) else value

    shards = shards_of(model)
    return {
        name: (gathered(name, parameter.detach()), gathered(name, parameter.grad))
        for name, parameter in model.named_parameters()
    }


def sharded(group, case, plan, again, layer_too, count):
    model = Block(case, again, mesh=group)
    if plan is not None:
        model.moe.planner = FixedPlanner(plan)
    mesh = dist.device_mesh.init_device_mesh("cpu", (WORLD,))
    own = set(parallel.expert_parameters(model))
    assert {id(parameter) for parameter in own} == {id(parameter) for parameter in model.moe.experts.parameters()}
    parallel.average_expert_gradients(model)
    if layer_too:
        fully_shard(model.moe, mesh=mesh, ignored_params=own)
    fully_shard(model, mesh=mesh, ignored_params=own)
    rank = dist.get_rank(group)
    steps(model, lambda: losses(model, case, rank), count)
    return whole(model)


@pytest.mark.parametrize(
    ("experts", "plan", "again", "layer_too"),
    [
        (4, None, False, False),
        (4, Plan(shard_degree=0), False, True),
        (1, Plan(shard_degree=2, pipeline_degree=2), False, True),
        (3, Plan(pipeline_degree=2), True, True),
    ],
    ids=["whole experts", "gathered weights", "sliced experts", "activation checkpointing"],
)
def test_steps_are_those_of_one_process(ranks, experts, plan, again, layer_too):
    case = Case(tokens=(5, 8), num_experts=experts)
    alone = Block(case)
    steps(alone, lambda: (losses(alone, case, 0) + losses(alone, case, 1)) / WORLD, 2)
    wanted = whole(alone)
    for given in ranks(WORLD).run(sharded, case, plan, again, layer_too, 2):
        assert given.keys() == wanted.keys()
        for name, (value, gradient) in wanted.items():
            assert_close(given[name][1], gradient, what=f"gradient of {name}")
            assert_close(given[name][0], value, what=name)
