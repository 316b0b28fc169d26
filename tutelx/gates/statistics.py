"""Sums over a batch, or over the batches of all ranks, that losses are made of. T tokens, K choices, E experts."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from tutelx import ops
from tutelx.errors import InvalidTypeError


def expert_counts(expert_ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    """[E] int64, how often each expert occurs in ids of any shape; -1 is nobody's."""
    if expert_ids.device.type == "cpu" and num_experts:
        return ops.route(expert_ids.reshape(1, -1), num_experts).counts.long()
    slots = expert_ids.reshape(-1).long() + 1
    # Not bincount, which waits for the device; one place in front for the unused.
    return slots.new_zeros(num_experts + 1).scatter_add_(0, slots, torch.ones_like(slots))[1:]


def expert_sums(expert_ids: torch.Tensor, values: torch.Tensor, num_experts: int) -> torch.Tensor:
    """[E], the values [T, K] of each expert's slots added up in float32 (float64 for float64); differentiable."""
    slots = expert_ids.reshape(-1).long() + 1
    values = values.reshape(-1).to(torch.promote_types(values.dtype, torch.float32))
    return values.new_zeros(num_experts + 1).index_add(0, slots, values)[1:]


def over_ranks(group: Any, *parts: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The sum of each tensor over the ranks of `group`, in one reduction; themselves for `group=None`.

    The gradient is that of the sum of all ranks' losses, as `torch.distributed` defines it, so that the average that
    DistributedDataParallel takes gives the gradient of the global loss. Every rank then weighs the loss equally, which
    makes a reduction in the backward needless: each rank's gradient is the world size times its own.
    """
    if group is None:
        return parts
    if not isinstance(group, dist.ProcessGroup):
        raise InvalidTypeError(f"group is {type(group).__name__}, expected a torch.distributed.ProcessGroup or None")
    wide = torch.float64 if any(part.dtype == torch.float64 for part in parts) else torch.float32
    packed = torch.cat([part.reshape(-1).to(wide) for part in parts])
    summed = _Sum.apply(packed, group).split([part.numel() for part in parts])
    return tuple(total.reshape(part.shape) for total, part in zip(summed, parts))


def batch_over_ranks(
    group: Any, tokens: int, *parts: torch.Tensor
) -> tuple[tuple[torch.Tensor, ...], int | torch.Tensor]:
    """:func:`over_ranks` of each tensor, and how many tokens all ranks have, at least 1."""
    if group is None:
        return parts, max(1, tokens)
    *summed, count = over_ranks(group, *parts, torch.full((), float(tokens), device=parts[0].device))
    return tuple(summed), count.clamp_min(1)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, group):
        ctx.ranks = dist.get_world_size(group)
        total = values.detach().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        return grad * ctx.ranks, None
