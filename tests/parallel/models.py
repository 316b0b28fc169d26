"""A small model with a replicated layer and experts that are spread over a group, and the same in one process."""

from functools import cache

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from tests.comm.shard_modules import LocalExperts, M
from tutelx.comm.shards import shards_of

TOKENS = 2


class SpreadExperts(LocalExperts):
    """y = sum over all experts e of down_e tanh(up_e x + up_bias_e) + down_bias_e, the plainest way to spread it: every
    rank computes its experts for the tokens of all ranks, and the parts are added up."""

    def __init__(self, group, num_experts: int) -> None:
        super().__init__(group, num_experts)
        self.group = group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        world = 1 if self.group is None else self.group.size()
        rank = 0 if self.group is None else self.group.rank()
        tokens = x if world == 1 else _Gather.apply(x, self.group)
        # Of the last bias of a sliced expert this rank has some columns.
        begin = shards_of(self)["down_bias"].index[1].start if world > 1 else 0
        y = tokens * 0
        for e in range(len(self.up)):
            hidden = torch.tanh(tokens @ self.up[e].T + self.up_bias[e])
            bias = F.pad(self.down_bias[e], (begin, M - begin - len(self.down_bias[e])))
            y = y + hidden @ self.down[e].T + bias
        # Every parameter has a gradient, also on a rank without experts.
        y = y + 0 * sum(parameter.sum() for parameter in self.parameters())
        return y if world == 1 else _AddUp.apply(y, self.group)[rank * len(x) : (rank + 1) * len(x)]


class _AddUp(torch.autograd.Function):
    """The sum over ranks of what each has, to all of them; its gradient is the same."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        x = x.contiguous().clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, gradient):
        return _AddUp.apply(gradient, ctx.group), None


class _Gather(torch.autograd.Function):
    """The tokens of all ranks; their gradients are added up and come back."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group, ctx.tokens = group, len(x)
        gathered = x.new_empty(group.size() * len(x), *x.shape[1:])
        dist.all_gather_into_tensor(gathered, x.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx, gradient):
        begin = ctx.group.rank() * ctx.tokens
        return _AddUp.apply(gradient, ctx.group)[begin : begin + ctx.tokens], None


class Model(nn.Module):
    def __init__(self, group, num_experts: int) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.before = nn.Linear(M, M)
        self.experts = SpreadExperts(group, num_experts)
        self.after = nn.Linear(M, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(torch.tanh(self.experts(self.before(x))))


def tokens_of(rank: int, step: int = 0) -> torch.Tensor:
    return torch.randn(TOKENS, M, generator=torch.Generator().manual_seed(100 * step + rank))


def loss_of(model: nn.Module, rank: int, step: int = 0) -> torch.Tensor:
    return (model(tokens_of(rank, step)) ** 2).sum()


def reference(num_experts: int, world: int, steps: int = 1) -> Model:
    """In one process, after the backward of the mean over `world` ranks of each step's losses."""
    model = Model(None, num_experts)
    for step in range(steps):
        (sum(loss_of(model, rank, step) for rank in range(world)) / world).backward()
    return model


def whole_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    shards = shards_of(model)
    found = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad if name not in shards else shards[name].whole(parameter.grad)
        found[name.removeprefix("module.")] = getattr(gradient, "full_tensor", lambda gradient=gradient: gradient)()
    return found


@cache
def grid(rows: int, columns: int):
    """Of the world's ranks: rows are replicas of the experts, which are spread over the columns."""
    return init_device_mesh("cpu", (rows, columns), mesh_dim_names=("replicas", "experts"))


@cache
def part_of(ranks: tuple[int, ...]):
    return dist.new_group(list(ranks))
