"""The pipeline's Python face: all-to-all -> experts -> all-to-all as one node of the autograd graph.

Legend: R rows that this rank sends (copies counted), n rows of a chunk, M model dim, E experts of this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.autograd.function import once_differentiable

from tutelx.comm._library import native
from tutelx.comm.call import RankCall
from tutelx.ops import ExpertWeights
from tutelx.types import DispatchMap, Plan

ModuleFn = Callable[[torch.Tensor, DispatchMap], torch.Tensor]


def run_ffn(
    call: RankCall, rows: torch.Tensor, weights: ExpertWeights, *, hidden_dim: int, activation: str, plan: Plan
) -> torch.Tensor:
    """The built-in experts, forward and backward in C++ without the GIL.

    Args:
        rows: [R, M] in the call's send order.
        weights: this rank's share, stacked, in the dtype of `rows`.
        hidden_dim: H of a whole expert.

    Returns:
        [R, M]. Differentiable in rows and weights; the gradients of the weights are those of the sum of the losses of
        all ranks.

    Raises:
        RankFailedError: another rank died, does not take part or is too late.
    """
    options = native.FfnOptions(
        activation=activation,
        kernel=_kernel(plan, rows.device),
        tile_rows=plan.tile_rows,
        tile_columns=plan.tile_columns,
    )
    stacked = [ws[0] if ws else None for ws in weights.lists()]
    rows, keep = _joined(call, rows, stacked)
    return _Ffn.apply(call, hidden_dim, options, keep, rows, *stacked)


def _kernel(plan: Plan, device: torch.device) -> str:
    if plan.expert_kernel == "bmm":
        return "batched"
    return "tiled" if device.type == "cpu" else "each"  # tiles are compiled for the CPU alone


def run_modules(
    call: RankCall, rows: torch.Tensor, experts: ModuleFn, parameters: Sequence[torch.Tensor], plan: Plan
) -> torch.Tensor:
    """Experts that are Python: called back for each chunk, [n, M] -> [n, M]. Else as :func:`run_ffn`.

    parameters: what the experts are differentiated for; autograd sees each once a call, however many chunks there are.
    """
    rows, keep = _joined(call, rows, parameters)
    return _Modules.apply(call, experts, plan, keep, rows, *parameters)


def _joined(call: RankCall, rows: torch.Tensor, weights: Sequence[torch.Tensor | None]) -> tuple[torch.Tensor, bool]:
    """If one rank runs the backward, all do, also those that need no gradient themselves."""
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (rows, *weights))
    if call.grad and not keep:
        return rows.detach().requires_grad_(), True
    return rows, keep


class _Ffn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call: RankCall, hidden_dim: int, options, keep: bool, rows: torch.Tensor, *weights):
        shards = call.shards(hidden_dim)
        with call.named_losses():
            out, kept = native.ffn_forward(call.exchange, call.traffic, shards, rows, weights, options, keep)
        call.bytes_weights += shards.bytes_sent
        ctx.call, ctx.hidden_dim, ctx.options = call, hidden_dim, options
        ctx.save_for_backward(*weights, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: torch.Tensor):
        saved = ctx.saved_tensors  # once: activation checkpointing gives them only once
        weights, kept = saved[:6], list(saved[6:])
        shards = ctx.call.shards(ctx.hidden_dim)
        with ctx.call.named_losses():
            grad_rows, grads = native.ffn_backward(
                ctx.call.exchange,
                ctx.call.traffic,
                shards,
                grad_out,
                kept,
                weights,
                ctx.options,
                ctx.call.train_experts,
            )
        ctx.call.bytes_weights += shards.bytes_sent
        return None, None, None, None, grad_rows, *grads


class _Modules(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call: RankCall, experts: ModuleFn, plan: Plan, keep: bool, rows: torch.Tensor, *parameters):
        ctx.call, ctx.chunks = call, []
        ctx.save_for_backward(*parameters)

        def compute(chunk: int, arrived: torch.Tensor) -> torch.Tensor:
            map = call.chunk_map(chunk, arrived, plan)
            if map.num_experts == 0:
                return arrived
            # Hooks of whoever checkpoints this node are not for the graph inside of it.
            with torch.set_grad_enabled(keep), torch.autograd.graph.saved_tensors_hooks(_itself, _itself):
                leaf = arrived.detach().requires_grad_(keep)
                out = experts(leaf, map).to(arrived.dtype)
            if keep:
                ctx.chunks.append((leaf, out))
            return out.detach()

        with call.named_losses():
            return native.run_with(call.exchange, call.traffic, rows, compute)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: torch.Tensor):
        parameters = ctx.saved_tensors
        sums = [torch.zeros_like(p) for p in parameters]
        wanted = [i for i, need in enumerate(ctx.needs_input_grad[5:]) if need]

        def compute(chunk: int, grad: torch.Tensor) -> torch.Tensor:
            if not ctx.chunks:
                return grad
            leaf, out = ctx.chunks[chunk]
            ctx.chunks[chunk] = None
            if not out.requires_grad:
                return torch.zeros_like(grad)
            # Not backward(): the hooks of the parameters (DDP, FSDP) must see one gradient a call.
            inputs = [leaf, *(parameters[i] for i in wanted)]
            grad_rows, *grads = torch.autograd.grad(out, inputs, grad, allow_unused=True)
            for i, g in zip(wanted, grads):
                if g is not None:
                    sums[i] += g
            return torch.zeros_like(grad) if grad_rows is None else grad_rows

        with ctx.call.named_losses():
            grad_rows = native.run_with(ctx.call.exchange, ctx.call.traffic, grad_out.contiguous(), compute)
        return (
            None,
            None,
            None,
            None,
            grad_rows,
            *(s if need else None for s, need in zip(sums, ctx.needs_input_grad[5:])),
        )


def _itself(t: torch.Tensor) -> torch.Tensor:
    return t
