"""encode: copy every token to the rows of the experts it chose."""

from __future__ import annotations

import torch

from tutelx.ops._checks import check_floating, check_same, check_tensor
from tutelx.ops._library import calls, kernels
from tutelx.types import DispatchMap


def encode(x: torch.Tensor, map: DispatchMap) -> torch.Tensor:
    """rows[r] = x[source[r] // K], and zeros where no slot fills the row.

    Args:
        x: [T, D] float32, float64, bfloat16 or float16, any strides.
        map: from :func:`tutelx.ops.route`.

    Returns:
        [R, D] in x's dtype. Differentiable in `x`.
    """
    if torch.compiler.is_compiling():
        _check(x, map)
        return kernels.encode(x, map.source, map.dest)
    try:
        return calls.encode(x, map.source, map.dest)
    except (TypeError, ValueError):
        _check(x, map)  # the operator checks the same; here in the caller's words, and only where it matters
        raise


def _check(x: torch.Tensor, map: DispatchMap) -> None:
    check_tensor(x, "x", dim=2)
    check_floating(x, "x")
    check_same(x.shape[0], "x.shape[0]", map.dest.shape[0], "the map's tokens")


@torch.library.register_fake("tutelx::encode")
def _(x, source, dest):
    return x.new_empty((source.shape[0], x.shape[1]))


@torch.library.register_fake("tutelx::encode_backward")
def _(grad_rows, dest):
    return grad_rows.new_empty((dest.shape[0], grad_rows.shape[1]))
