"""gate: from logits to the chosen experts and their weights."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from tutelx.errors import InvalidValueError
from tutelx.ops._checks import check_floating, check_int, check_tensor
from tutelx.ops._library import calls, kernels

Score = Literal["softmax", "sigmoid"]


class Gated(NamedTuple):
    """expert_ids [T, K] int32, weights [T, K], score_sum [E] over all tokens, logsumexp [T] of the logits."""

    expert_ids: torch.Tensor
    weights: torch.Tensor
    score_sum: torch.Tensor
    logsumexp: torch.Tensor


def gate(logits: torch.Tensor, top_k: int, *, score: Score = "softmax", normalize: bool = True) -> Gated:
    """The K largest of each token's logits, best first, the lower index winning a tie, with their scores as weights.

    Args:
        logits: [T, E] float32, float64, bfloat16 or float16.
        top_k: K, 1..E.
        score: softmax over all experts, or a sigmoid for each.
        normalize: divide a token's K weights by their sum; with softmax this equals a softmax over the K chosen logits.

    Returns:
        Weights and statistics in float32 (float64 for float64 logits). Differentiable in `logits` through `weights`,
        `score_sum` and `logsumexp`.

    Raises:
        InvalidValueError: top_k outside [1, E]. ValueError: on CPU, a logit that is NaN or +inf, or a token without
        a finite one. CUDA would have to wait to raise: NaN comes last there, and shows in logsumexp and score_sum.
    """
    check_tensor(logits, "logits", dim=2)
    check_floating(logits, "logits")
    check_int(logits.shape[1], "logits.shape[1] (num_experts)")
    check_int(top_k, "top_k")
    if top_k > logits.shape[1]:
        raise InvalidValueError(f"top_k={top_k} exceeds num_experts={logits.shape[1]}")
    if score not in ("softmax", "sigmoid"):
        raise InvalidValueError(f"score={score!r} is neither 'softmax' nor 'sigmoid'")
    gate = kernels.gate if torch.compiler.is_compiling() else calls.gate
    return Gated(*gate(logits, top_k, score, normalize))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.library.register_fake("tutelx::gate")
def _(logits, k, score, renormalize):
    T, E = logits.shape
    wide = _wide(logits.dtype)
    return (
        logits.new_empty((T, k), dtype=torch.int32),
        logits.new_empty((T, k), dtype=wide),
        logits.new_empty((E,), dtype=wide),
        logits.new_empty((T,), dtype=wide),
    )


@torch.library.register_fake("tutelx::gate_backward")
def _(grad_weights, grad_score_sum, grad_logsumexp, logits, expert_ids, logsumexp, score, renormalize):
    return logits.new_empty(logits.shape)
