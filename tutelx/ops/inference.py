"""inference: from the gate's choices to the layer's result in one operator, where no gradient is wanted."""

from __future__ import annotations

from itertools import chain

import torch

from tutelx.errors import InvalidValueError
from tutelx.ops._checks import wants_gradient
from tutelx.ops._library import calls, kernels
from tutelx.ops.activation import Activation
from tutelx.ops.expert_ffn import ExpertWeights
from tutelx.types import DispatchMap


def inference(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
    experts: ExpertWeights,
    *,
    num_experts: int,
    activation: Activation = "silu",
    tile_rows: int = 512,
    tile_columns: int = 512,
) -> tuple[torch.Tensor, DispatchMap]:
    """What `route`, `encode`, `expert_ffn` and `decode` give one after the other, bit for bit, dropping nothing.

    For few tokens, where calling each of them takes as long as what it does. On CPU only, and not differentiable.

    Args:
        x: [T, M].
        expert_ids: [T, K] int32, -1 for an unused slot.
        weights: [T, K], float32 or the dtype of x.
        experts, activation, tile_rows, tile_columns: as for :func:`tutelx.ops.expert_ffn`.

    Returns:
        y [T, M], and where the slots went: ragged.

    Raises:
        InvalidValueError: a gradient is wanted. ValueError, TypeError: as those four do.
    """
    if wants_gradient(x, weights, *chain.from_iterable(experts.lists())):
        raise InvalidValueError("x, weights or experts require a gradient, which inference cannot give")
    call = kernels.inference if torch.compiler.is_compiling() else calls.inference
    y, dest, source, counts, offsets = call(
        x, expert_ids, weights, num_experts, *experts.lists(), activation, tile_rows, tile_columns
    )
    map = DispatchMap(
        dest=dest,
        source=source,
        counts=counts,
        offsets=offsets,
        num_experts=num_experts,
        layout="ragged",
        capacity=None,
    )
    return y, map


@torch.library.register_fake("tutelx::inference")
def _(x, expert_ids, weights, num_experts, *args):
    T, K = expert_ids.shape
    new = expert_ids.new_empty
    return x.new_empty(x.shape), new((T, K)), new((T * K,)), new((num_experts,)), new((num_experts + 1,))
