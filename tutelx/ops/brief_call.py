"""A call of `gated_inference` made ready to be run many times: where it is short, what Python does around it counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from tutelx.ops._library import calls
from tutelx.ops.activation import Activation
from tutelx.ops.expert_ffn import ExpertWeights
from tutelx.ops.gate import Score

_BriefCall = getattr(calls, "BriefCall", None)  # a build without Python's headers has none

# Makes the fields of an `ops.GatedInference`.
Fields = Callable[[], tuple[torch.Tensor, ...]]


class BriefCall(Protocol):
    """Asks in one go what keeps a call from being run: each question from Python costs what a small operator does."""

    def is_like(self, x: torch.Tensor) -> bool:
        """Whether x [..., M] is as many tokens as it was made for, of their dtype, and neither the number of threads
        nor whether gradients are on has changed."""

    def run(self, x: torch.Tensor) -> tuple[torch.Tensor, Fields] | None:
        """y, in the shape of x [..., M], and what makes all fields; None where calling `gated_inference` would lose
        something: x has many tokens, weights have another dtype, a gradient is wanted, a profiler runs, something is
        cast."""


def brief_call(
    x: torch.Tensor,
    router: torch.Tensor,
    experts: ExpertWeights,
    *,
    top_k: int,
    score: Score,
    normalize: bool,
    activation: Activation,
    tile_rows: int,
    tile_columns: int,
) -> BriefCall | None:
    """`gated_inference` of tokens like x [..., M]; None in a build without Python's headers, and while torch.compile
    traces."""
    if _BriefCall is None or torch.compiler.is_compiling():
        return None
    lists = experts.lists()
    return _BriefCall(x, router, top_k, score, normalize, *lists, activation, tile_rows, tile_columns)
