"""What a Tutel layer computes, token by token in plain torch: slow and obvious.

T tokens, M model dim, E experts, K choices a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.nn import functional as F


def rows_allowed(factor: float, tokens: int, top_k: int, num_experts: int, alignment: int = 1) -> int:
    """K * floor(f * ceil(T/E)), or where that is 0 ceil(f*K*T/E), up to the next multiple of the alignment."""
    allowed = top_k * math.floor(abs(factor) * math.ceil(tokens / num_experts))
    allowed = allowed or math.ceil(abs(factor) * top_k * tokens / num_experts)
    while allowed % alignment:
        allowed += 1
    return allowed


def layer(
    x: torch.Tensor,
    logits: torch.Tensor,
    experts: list[Callable[[torch.Tensor], torch.Tensor]],
    *,
    top_k: int,
    capacity: int | None,
    normalize: bool = True,
    by_priority: bool = False,
    before: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, M], logits [T, E] -> y [T, O], loss E * sum_e f_e * P_e.

    capacity: rows of an expert, None for any number. before: weights multiply what the expert gets.
    """
    scores = F.softmax(logits, dim=1)
    tokens, num_experts = scores.shape
    values = scores.tolist()
    chosen = [sorted(range(num_experts), key=lambda e: (-values[t][e], e))[:top_k] for t in range(tokens)]
    order = sorted(range(tokens), key=lambda t: -max(values[t])) if by_priority else list(range(tokens))
    used = [0] * num_experts
    y = [torch.zeros(()) for _ in range(tokens)]
    for choice in range(top_k):
        for t in order:
            expert = chosen[t][choice]
            used[expert] += 1
            if capacity is not None and used[expert] > capacity:
                continue
            weight = scores[t, expert]
            if normalize and top_k > 1:
                weight = weight / sum(scores[t, e] for e in chosen[t])
            y[t] = y[t] + (experts[expert](weight * x[t]) if before else weight * experts[expert](x[t]))
    out = next(each.shape for each in y if each.dim())
    first = torch.tensor([sum(c[0] == e for c in chosen) / tokens for e in range(num_experts)], dtype=scores.dtype)
    loss = num_experts * (first * scores.mean(dim=0)).sum()
    return torch.stack([each if each.dim() else x.new_zeros(out) for each in y]), loss


def feed_forward(fc1, fc2, bias1=None, bias2=None, activation=F.relu) -> list[Callable[[torch.Tensor], torch.Tensor]]:
    """act(x @ fc1.T + bias1) @ fc2 + bias2 for each expert; fc1 [E, H, M], fc2 [E, H, O]."""

    def expert(e: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def run(token: torch.Tensor) -> torch.Tensor:
            hidden = fc1[e] @ token + (0 if bias1 is None else bias1[e])
            return activation(hidden) @ fc2[e] + (0 if bias2 is None else bias2[e])

        return run

    return [expert(e) for e in range(fc1.shape[0])]


def llama(fc1, fc2, fc3, activation=F.silu) -> list[Callable[[torch.Tensor], torch.Tensor]]:
    """(act(x @ fc1) * (x @ fc2)) @ fc3 for each expert; fc1, fc2 [E, M, H], fc3 [E, H, M]."""
    return [lambda token, e=e: (activation(token @ fc1[e]) * (token @ fc2[e])) @ fc3[e] for e in range(fc1.shape[0])]
