"""decode: weigh the rows of a token's experts and add them up."""

from __future__ import annotations

import torch

from tutelx.errors import InvalidTypeError
from tutelx.ops._checks import check_floating, check_same, check_tensor
from tutelx.ops._library import calls, kernels
from tutelx.types import DispatchMap


def decode(rows: torch.Tensor, map: DispatchMap, weights: torch.Tensor) -> torch.Tensor:
    """y[t] = sum over k of weights[t, k] * rows[dest[t, k]]; a dropped slot adds nothing and gets no gradient.

    Args:
        rows: [R, D] float32, float64, bfloat16 or float16, any strides.
        map: from :func:`tutelx.ops.route`.
        weights: [T, K], float32 or the dtype of `rows`.

    Returns:
        [T, D] in the dtype of `rows`, summed in float32 (float64 for float64 rows). Differentiable in both tensors.
    """
    if torch.compiler.is_compiling():
        _check(rows, map, weights)
        return kernels.decode(rows, map.dest, map.source, weights)
    try:
        return calls.decode(rows, map.dest, map.source, weights)
    except (TypeError, ValueError):
        _check(rows, map, weights)  # as in encode
        raise


def _check(rows: torch.Tensor, map: DispatchMap, weights: torch.Tensor) -> None:
    check_tensor(rows, "rows", dim=2)
    check_floating(rows, "rows")
    check_tensor(weights, "weights", dim=2)
    check_same(rows.shape[0], "rows.shape[0]", map.num_rows, "the map's rows")
    check_same(tuple(weights.shape), "weights.shape", tuple(map.dest.shape), "the map's [T, K]")
    if weights.dtype not in (torch.float32, rows.dtype):
        raise InvalidTypeError(f"weights is {weights.dtype}, expected torch.float32 or {rows.dtype} as rows")


@torch.library.register_fake("tutelx::decode")
def _(rows, dest, source, weights):
    return rows.new_empty((dest.shape[0], rows.shape[1]))


@torch.library.register_fake("tutelx::decode_backward")
def _(grad_y, rows, dest, source, weights):
    return rows.new_empty(rows.shape), weights.new_empty(weights.shape)
