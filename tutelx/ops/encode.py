"""encode: copy every token to the rows of the experts it chose."""

from __future__ import annotations

import torch

from tutelx.ops._checks import check_floating, check_same, check_tensor
from tutelx.ops._library import kernels
from tutelx.types import DispatchMap


def encode(x: torch.Tensor, map: DispatchMap) -> torch.Tensor:
    """rows[r] = x[source[r] // K], and zeros where no slot fills the row.

    Args:
        x: [T, D] float32, float64, bfloat16 or float16, any strides.
        map: from :func:`tutelx.ops.route`.

    Returns:
        [R, D] in x's dtype. Differentiable in `x`.
    """
    check_tensor(x, "x", dim=2)
    check_floating(x, "x")
    check_same(x.shape[0], "x.shape[0]", map.dest.shape[0], "the map's tokens")
    return kernels.encode(x, map.source, map.dest)


@torch.library.register_fake("tutelx::encode")
def _(x, source, dest):
    return x.new_empty((source.shape[0], x.shape[1]))


@torch.library.register_fake("tutelx::encode_backward")
def _(grad_rows, dest):
    return grad_rows.new_empty((dest.shape[0], grad_rows.shape[1]))


def _setup(ctx, inputs, output):
    _, _, dest = inputs
    ctx.save_for_backward(dest)


def _backward(ctx, grad_rows):
    (dest,) = ctx.saved_tensors
    return kernels.encode_backward(grad_rows, dest), None, None


torch.library.register_autograd("tutelx::encode", _backward, setup_context=_setup)


def _setup_backward(ctx, inputs, output):
    grad_rows, dest = inputs
    ctx.save_for_backward(dest)
    ctx.rows = grad_rows.shape[0]


def _double_backward(ctx, grad_x):
    (dest,) = ctx.saved_tensors
    return kernels.encode(grad_x, _source_of(dest, ctx.rows), dest), None


def _source_of(dest: torch.Tensor, rows: int) -> torch.Tensor:
    """The inverse of `dest`; double backward only, so speed does not matter."""
    slots = torch.arange(dest.numel(), dtype=torch.int32, device=dest.device)
    flat = dest.reshape(-1).long()
    source = torch.full((rows + 1,), -1, dtype=torch.int32, device=dest.device)
    source[torch.where(flat < 0, rows, flat)] = slots
    return source[:rows]


torch.library.register_autograd("tutelx::encode_backward", _double_backward, setup_context=_setup_backward)
