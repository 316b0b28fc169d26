"""From tokens, or from the gate's choices, to the layer's result in one operator, where no gradient is wanted."""

from __future__ import annotations

from itertools import chain
from typing import NamedTuple

import torch

from tutelx.errors import InvalidValueError
from tutelx.ops._checks import wants_gradient
from tutelx.ops._library import calls, kernels
from tutelx.ops.activation import Activation
from tutelx.ops.expert_ffn import ExpertWeights, Tensors
from tutelx.ops.gate import Score, _wide
from tutelx.types import DispatchMap


class GatedInference(NamedTuple):
    """y [T, M], the arrays of `map`, logits [T, E], expert_ids [T, K] int32 and weights [T, K] float32."""

    y: torch.Tensor
    dest: torch.Tensor
    source: torch.Tensor
    counts: torch.Tensor
    offsets: torch.Tensor
    logits: torch.Tensor
    expert_ids: torch.Tensor
    weights: torch.Tensor

    @property
    def map(self) -> DispatchMap:
        """Where the slots went: ragged."""
        return _ragged(self.dest, self.source, self.counts, self.offsets)


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
    lists = experts.lists()
    _check_no_gradient("x, weights or experts", x, weights, lists)
    call = kernels.inference if torch.compiler.is_compiling() else calls.inference
    y, *arrays = call(x, expert_ids, weights, num_experts, *lists, activation, tile_rows, tile_columns)
    return y, _ragged(*arrays)


def gated_inference(
    x: torch.Tensor,
    router: torch.Tensor,
    experts: ExpertWeights,
    *,
    top_k: int,
    score: Score = "softmax",
    normalize: bool = True,
    activation: Activation = "silu",
    tile_rows: int = 512,
    tile_columns: int = 512,
) -> GatedInference:
    """:func:`inference` after `linear` and `gate`: the same bits as all of them one after the other.

    Args:
        x: [T, M].
        router: [E, M], the dtype of x.
        top_k, score, normalize: as for :func:`tutelx.ops.gate`.
        experts, activation, tile_rows, tile_columns: as for :func:`tutelx.ops.expert_ffn`.

    Raises:
        InvalidValueError: a gradient is wanted. ValueError, TypeError: as those do.
    """
    lists = experts.lists()
    _check_no_gradient("x, router or experts", x, router, lists)
    call = kernels.gated_inference if torch.compiler.is_compiling() else calls.gated_inference
    return GatedInference(*call(x, router, top_k, score, normalize, *lists, activation, tile_rows, tile_columns))


def _check_no_gradient(names: str, first: torch.Tensor, second: torch.Tensor, lists: tuple[Tensors, ...]) -> None:
    if wants_gradient(first, second, *chain.from_iterable(lists)):
        raise InvalidValueError(f"{names} require a gradient, which inference cannot give")


def _ragged(dest: torch.Tensor, source: torch.Tensor, counts: torch.Tensor, offsets: torch.Tensor) -> DispatchMap:
    return DispatchMap(
        dest=dest,
        source=source,
        counts=counts,
        offsets=offsets,
        num_experts=counts.shape[0],
        layout="ragged",
        capacity=None,
    )


@torch.library.register_fake("tutelx::inference")
def _(x, expert_ids, weights, num_experts, *args):
    T, K = expert_ids.shape
    new = expert_ids.new_empty
    return x.new_empty(x.shape), new((T, K)), new((T * K,)), new((num_experts,)), new((num_experts + 1,))


@torch.library.register_fake("tutelx::gated_inference")
def _(x, router, k, *args):
    T, E = x.shape[0], router.shape[0]

    def new(*shape: int) -> torch.Tensor:
        return x.new_empty(shape, dtype=torch.int32)

    map = new(T, k), new(T * k), new(E), new(E + 1)
    weights = x.new_empty((T, k), dtype=_wide(x.dtype))
    return x.new_empty(x.shape), *map, x.new_empty((T, E)), new(T, k), weights
