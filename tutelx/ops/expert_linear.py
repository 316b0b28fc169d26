"""expert_linear: every expert's own matrix over the rows that arrived."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from tutelx.ops._checks import check_floating, check_int, check_same, check_tensor
from tutelx.ops._library import kernels
from tutelx.ops.segments import split_segments
from tutelx.types import DispatchMap

Tensors = tuple[torch.Tensor, ...]


def expert_linear(
    rows: torch.Tensor,
    map: DispatchMap,
    weight: Tensors,
    bias: Tensors = (),
    *,
    tile_rows: int = 512,
    tile_columns: int = 512,
) -> torch.Tensor:
    """rows[r] @ weight[e].T + bias[e] for the rows of every expert e; a row that no slot fills gives zeros.

    For experts that have something between their products that :func:`tutelx.ops.expert_ffn` does not know.

    Args:
        rows: [R, I], as :func:`tutelx.ops.encode` gives them.
        map: from :func:`tutelx.ops.route`.
        weight: E matrices [O, I], or one tensor [E, O, I], of any strides, in the dtype of `rows`.
        bias: E vectors [O], or one tensor [E, O]; empty for none.
        tile_rows, tile_columns: the most rows and output columns of one matrix product; threads share the tiles.

    Returns:
        [R, O]. Differentiable in `rows`, `weight` and `bias`; a weight's gradient has the strides of the weight.
        Compiled for CPU; elsewhere a loop of torch's own products.

    Raises:
        ValueError, TypeError: sizes or dtypes that do not fit together; the message names both.
    """
    check_tensor(rows, "rows", dim=2)
    check_floating(rows, "rows")
    check_same(rows.shape[0], "rows.shape[0]", map.num_rows, "the map's rows")
    check_int(tile_rows, "tile_rows")
    check_int(tile_columns, "tile_columns")
    if rows.device.type != "cpu":
        return _by_torch(rows, map, weight, bias)
    return kernels.expert_linear(rows, map.counts, map.offsets, weight, bias, tile_rows, tile_columns)


def _by_torch(rows: torch.Tensor, map: DispatchMap, weight: Tensors, bias: Tensors) -> torch.Tensor:
    # unbind, not indexing: its backward stacks the experts' gradients once.
    weights = weight[0].unbind(0) if len(weight) == 1 and weight[0].dim() == 3 else weight
    biases = bias[0].unbind(0) if len(bias) == 1 and bias[0].dim() == 2 else bias
    pieces = split_segments(rows, map)
    for i, piece in enumerate(pieces):
        if i % 2 or i // 2 == map.num_experts:
            pieces[i] = piece.new_zeros((len(piece), weights[0].shape[0]))
        else:
            pieces[i] = F.linear(piece, weights[i // 2], biases[i // 2] if biases else None)
    return torch.cat(pieces)


@torch.library.register_fake("tutelx::expert_linear")
def _(rows, counts, offsets, weight, bias, tile_rows, tile_columns):
    return rows.new_empty((rows.shape[0], weight[0].shape[-2]))


@torch.library.register_fake("tutelx::expert_linear_backward")
def _(grad_out, rows, counts, offsets, weight, bias, tile_rows, tile_columns, need_rows, need_weights):
    grads = [[torch.empty_like(w) for w in ws] if need_weights else [] for ws in (weight, bias)]
    return rows.new_empty(rows.shape if need_rows else (0,)), *grads
