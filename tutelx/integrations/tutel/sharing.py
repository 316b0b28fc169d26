"""Experts in plain torch whose weights lie in parts on several ranks: gathered for one call, gradients sent home.

W ranks, s ranks an expert, k ranks that gather from each other, n numbers of a rank's share, R rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from tutelx.errors import InvalidValueError
from tutelx.types import DispatchMap, Plan

if TYPE_CHECKING:
    from tutelx.comm.call import RankCall
    from tutelx.comm.ranks import Ranks


def gather(shares: Sequence[torch.Tensor], ranks: Ranks, call: RankCall, size: int) -> list[torch.Tensor]:
    """Each tensor of this rank as one [k, ...] of all ranks of its block of `size` consecutive ones.

    All ranks must call. The gradients are sent home and added up in float32 (float64), in the order of the ranks.
    """
    if size == 1:
        return [share.unsqueeze(0) for share in shares]
    flat = torch.cat([share.reshape(-1) for share in shares])
    if call.train_experts and torch.is_grad_enabled() and not flat.requires_grad:
        flat = flat.detach().requires_grad_()  # some rank trains: all send gradients
    parts = _Gather.apply(flat, ranks, call, size).split([share.numel() for share in shares], dim=1)
    return [part.reshape(size, *share.shape) for part, share in zip(parts, shares)]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, flat_n: torch.Tensor, ranks: Ranks, call: RankCall, size: int):
        ctx.ranks, ctx.call, ctx.size = ranks, call, size
        return _exchange(ctx, flat_n.unsqueeze(0).expand(size, -1).contiguous())

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_kn: torch.Tensor):
        arrived = _exchange(ctx, grad_kn.contiguous())
        wide = torch.float64 if arrived.dtype == torch.float64 else torch.float32
        total = arrived[0].to(wide)
        for part in arrived[1:]:
            total = total + part
        return total.to(arrived.dtype), None, None, None


def _exchange(ctx: Any, rows_kn: torch.Tensor) -> torch.Tensor:
    """Row j to the j-th rank of the block, and what they sent here, in their order."""
    from tutelx.comm._library import native

    mesh, size = ctx.ranks.mesh, ctx.size
    counts = [[int(a // size == b // size) for b in range(mesh.world)] for a in range(mesh.world)]
    exchange = native.Exchange(mesh.group)
    with ctx.call.named_losses():
        out = exchange.all_to_all(rows_kn, counts)
    ctx.call.bytes_weights += exchange.bytes_sent
    return out


def run_resized(
    call: RankCall,
    rows: torch.Tensor,
    compute: Callable[[torch.Tensor, DispatchMap], torch.Tensor],
    parameters: Sequence[torch.Tensor],
    plan: Plan,
    *,
    out_dim: int | None,
) -> torch.Tensor:
    """As `tutelx.comm.pipeline.run_modules`, for experts whose rows [n, M] become [n, out_dim]: [R, M] -> [R, out_dim].

    out_dim: None where only the experts know; it is then at most M.

    Raises:
        InvalidValueError: experts of unknown size made their rows longer.
    """
    from tutelx.comm.pipeline import run_modules

    model_dim = rows.shape[1]
    width = max(model_dim, out_dim or 0)
    found = out_dim

    def resized(arrived: torch.Tensor, map: DispatchMap) -> torch.Tensor:
        nonlocal found
        out = compute(arrived[:, :model_dim], map)
        found = out.shape[1]
        if found > width:
            raise InvalidValueError(
                f"experts returned rows of {found} numbers for {model_dim}: over ranks, at most that"
            )
        return F.pad(out, (0, width - found))

    y = run_modules(call, F.pad(rows, (0, width - model_dim)), resized, parameters, plan)
    assert found is not None
    return y[:, :found]


def batched(rows: torch.Tensor, map: DispatchMap) -> torch.Tensor:
    """Padded rows [E*C, M] as [E, C, M]."""
    return rows.reshape(map.num_experts, rows.shape[0] // map.num_experts, rows.shape[1])
