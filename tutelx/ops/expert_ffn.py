"""expert_ffn: every expert's feed-forward network over the rows that arrived."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tutelx.ops._checks import check_floating, check_int, check_same, check_tensor
from tutelx.ops._library import kernels
from tutelx.ops.activation import Activation, check_activation
from tutelx.ops.expert_products import by_torch
from tutelx.types import DispatchMap

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class ExpertWeights:
    """Weights of all experts, read where they lie: any strides, no copy.

    Each entry is a tuple of E matrices [out, in], or of one tensor [E, out, in] (biases: [out] or [E, out]).
    up: [H, M], down: [M, H]; gate: [H, M] makes the experts gated. Empty where there is none.
    """

    up: Tensors
    down: Tensors
    gate: Tensors = ()
    gate_bias: Tensors = ()
    up_bias: Tensors = ()
    down_bias: Tensors = ()

    def lists(self) -> tuple[Tensors, ...]:
        """In the order of the operator's schema."""
        return self.gate, self.up, self.down, self.gate_bias, self.up_bias, self.down_bias

    def to(self, dtype: torch.dtype) -> ExpertWeights:
        """Themselves if they have the dtype already; else, under autocast only, differentiable casts of them."""
        if self.up[0].dtype == dtype or not torch.is_autocast_enabled(self.up[0].device.type):
            return self
        names = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")
        return ExpertWeights(**{name: tuple(w.to(dtype) for w in ws) for name, ws in zip(names, self.lists())})


def expert_ffn(
    rows: torch.Tensor,
    map: DispatchMap,
    weights: ExpertWeights,
    *,
    activation: Activation = "silu",
    tile_rows: int = 512,
    tile_columns: int = 512,
    zero_unused: bool = True,
) -> torch.Tensor:
    """Gated: down(act(gate(x)) * up(x)); else down(act(up(x))). A row that no slot fills gives zeros.

    Args:
        rows: [R, M], as :func:`tutelx.ops.encode` gives them.
        map: from :func:`tutelx.ops.route`.
        weights: in the dtype of `rows`.
        activation: silu, gelu (erf), gelu_tanh or relu.
        tile_rows, tile_columns: the most rows and output columns of one matrix product; threads share the tiles.
        zero_unused: the gradient of a listed expert that got no rows is zero; False: there is none (`.grad` stays
            None), as in a loop that skips such experts. Optimizers treat the two differently.

    Returns:
        [R, M]. Differentiable in `rows` and all weights. Compiled for CPU; elsewhere torch's own products:
        grouped ones where they can run, else expert by expert, which waits for the device.

    Raises:
        ValueError, TypeError: sizes or dtypes that do not fit together; the message names both.
    """
    check_tensor(rows, "rows", dim=2)
    check_floating(rows, "rows")
    check_activation(activation)
    check_same(rows.shape[0], "rows.shape[0]", map.num_rows, "the map's rows")
    check_int(tile_rows, "tile_rows")
    check_int(tile_columns, "tile_columns")
    if rows.device.type != "cpu":
        return by_torch(rows, map, weights, activation, zero_unused=zero_unused)
    # A traced graph knows no missing gradient. What the backward needs is kept where a gradient is recorded.
    zero_unused = zero_unused or torch.compiler.is_compiling()
    out, _, _ = kernels.expert_ffn(
        rows, map.counts, map.offsets, *weights.lists(), activation, tile_rows, tile_columns, False, zero_unused
    )
    return out


@torch.library.register_fake("tutelx::expert_ffn")
def _(rows, counts, offsets, gate, up, *args):
    keep = args[-2]
    kept = (rows.shape[0], up[0].shape[-2])
    return (
        rows.new_empty(rows.shape),
        rows.new_empty(kept if keep and gate else (0,)),
        rows.new_empty(kept if keep else (0,)),
    )


@torch.library.register_fake("tutelx::expert_ffn_backward")
def _(grad_out, rows, counts, offsets, *args):
    lists, need_rows, need_weights = args[:6], args[-3], args[-2]
    grads = [[torch.empty_like(w) for w in ws] if need_weights else [] for ws in lists]
    return rows.new_empty(rows.shape if need_rows else (0,)), *grads
