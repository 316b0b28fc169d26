"""Parallelism-coordinated communication (DeepSpeed-MoE, section 5.3): ranks of a tensor-parallel group hold the same
tokens, so that each sends only its share of them to the experts, and the group gathers what comes back.

Symbols: L ranks of the group, T tokens, M model dim, K choices a token.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist

from tutelx.comm.agreement import agree_on_size
from tutelx.comm.mesh import Mesh
from tutelx.comm.placement import chunk
from tutelx.types import Routing


class TensorParallel:
    """The group. Every rank computes the gate for all tokens, as the group's other layers do with replicated weights:
    so gate, auxiliary losses and their gradients are whole on each rank.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh

    def __deepcopy__(self, memo: dict) -> TensorParallel:
        return self

    def share(self, x: torch.Tensor, routing: Routing) -> tuple[torch.Tensor, Routing]:
        """This rank's tokens of x [T, M], and the routing of them; their gradients are gathered from the group.

        Raises:
            RankMismatchError: the ranks do not hold equally many tokens.
        """
        agree_on_size(self.mesh, x.shape[0], x.device)
        part = chunk(x.shape[0], self.mesh.world, self.mesh.rank)
        priority = routing.priority
        mine = replace(
            routing,
            expert_ids=routing.expert_ids[part.start : part.stop],
            weights=_Share.apply(self.mesh, routing.weights),
            priority=None if priority is None else priority[part.start : part.stop],
        )
        return _Share.apply(self.mesh, x), mine

    def gather(self, y: torch.Tensor, tokens: int) -> torch.Tensor:
        """The group's shares -> [T, M] on every rank."""
        return _Gather.apply(self.mesh, y, tokens)


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mesh: Mesh, whole: torch.Tensor) -> torch.Tensor:
        ctx.mesh, ctx.tokens = mesh, whole.shape[0]
        part = chunk(whole.shape[0], mesh.world, mesh.rank)
        return whole[part.start : part.stop].clone()

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return None, _all_gather(ctx.mesh, grad, ctx.tokens)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mesh: Mesh, part: torch.Tensor, tokens: int) -> torch.Tensor:
        ctx.mesh = mesh
        return _all_gather(mesh, part, tokens)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        # Every rank goes on with the same y, so that each has the whole gradient of its part already.
        part = chunk(grad.shape[0], ctx.mesh.world, ctx.mesh.rank)
        return None, grad[part.start : part.stop].contiguous(), None


def _all_gather(mesh: Mesh, part: torch.Tensor, tokens: int) -> torch.Tensor:
    """Shares of equal size but for the last ones, which are padded on the way."""
    size = -(-tokens // mesh.world)
    padded = part.new_zeros((size, *part.shape[1:]))
    padded[: part.shape[0]] = part
    whole = part.new_empty((size * mesh.world, *part.shape[1:]))
    # As bytes: not every backend gathers every dtype.
    dist.all_gather_into_tensor(
        whole.reshape(-1).view(torch.uint8), padded.reshape(-1).view(torch.uint8), group=mesh.group
    )
    return whole[:tokens]
