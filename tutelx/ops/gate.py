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


def gate(
    logits: torch.Tensor,
    top_k: int,
    *,
    score: Score = "softmax",
    normalize: bool = True,
    bias: torch.Tensor | None = None,
    num_groups: int = 1,
    kept_groups: int = 1,
    best_of_group: int = 1,
) -> Gated:
    """The K largest of each token's logits, best first, the lower index winning a tie, with their scores as weights.

    With a bias experts are compared by score + bias, and still weighted by the score. With groups only the experts of
    a token's best groups are compared (DeepSeek-V2 and V3, sections 2.1.2).

    Args:
        logits: [T, E] float32, float64, bfloat16 or float16.
        top_k: K, 1..E.
        score: softmax over all experts, or a sigmoid for each.
        normalize: divide a token's K weights by their sum; with softmax this equals a softmax over the K chosen logits.
            Weights that are all 0 stay so.
        bias: [E] floating; no gradient.
        num_groups: G, a divisor of E, at most 256 on CUDA; group g has experts g*E/G .. (g+1)*E/G - 1.
        kept_groups: 1..G, groups that a token may choose from; of equally good ones the lower index is kept.
        best_of_group: 1 or 2; a group is as good as the sum of so many of what its experts are compared by.

    Returns:
        Weights and statistics in float32 (float64 for float64 logits). Differentiable in `logits` through `weights`,
        `score_sum` and `logsumexp`.

    Raises:
        InvalidValueError: top_k outside [1, E], a bias that requires a gradient. ValueError: groups that E does not
        allow; on CPU, a logit or a bias that is NaN or +inf, or a token without a finite logit. CUDA would have to wait
        to raise: NaN comes last there, and a logit that is NaN shows in logsumexp and score_sum.
    """
    check_tensor(logits, "logits", dim=2)
    check_floating(logits, "logits")
    check_int(logits.shape[1], "logits.shape[1] (num_experts)")
    check_int(top_k, "top_k")
    if top_k > logits.shape[1]:
        raise InvalidValueError(f"top_k={top_k} exceeds num_experts={logits.shape[1]}")
    if score not in ("softmax", "sigmoid"):
        raise InvalidValueError(f"score={score!r} is neither 'softmax' nor 'sigmoid'")
    if bias is not None:
        check_tensor(bias, "bias", dim=1)
        check_floating(bias, "bias")
        if bias.requires_grad:
            raise InvalidValueError("bias requires a gradient, which gate cannot give")
    gate = kernels.gate if torch.compiler.is_compiling() else calls.gate
    return Gated(*gate(logits, top_k, score, normalize, bias, num_groups, kept_groups, best_of_group))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.library.register_fake("tutelx::gate")
def _(logits, k, score, renormalize, bias=None, num_groups=1, kept_groups=1, best_of_group=1):
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
