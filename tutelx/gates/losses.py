"""Auxiliary losses of a gate. T tokens, K choices, E experts."""

from __future__ import annotations

import torch


def switch_balance(expert_ids: torch.Tensor, score_sum: torch.Tensor) -> torch.Tensor:
    """E * sum_i f_i * P_i (Switch Transformers, eq. 4, without its alpha); 1 when routing is uniform.

    f_i is the share of tokens whose first choice is expert i (no gradient), P_i the mean probability of i.

    Args:
        expert_ids: [T, K] int32, first choice first.
        score_sum: [E], the sum over tokens of the gate's probabilities.
    """
    tokens, num_experts = expert_ids.shape[0], score_sum.shape[0]
    if tokens == 0:
        return score_sum.sum() * 0.0
    first = torch.bincount(expert_ids[:, 0].long(), minlength=num_experts).to(score_sum.dtype)
    return num_experts * torch.dot(first, score_sum) / tokens**2


def router_z(logsumexp: torch.Tensor) -> torch.Tensor:
    """mean over tokens of logsumexp^2 (ST-MoE, eq. 5, without its coefficient).

    Args:
        logsumexp: [T], of each token's router logits.
    """
    return logsumexp.square().sum() / max(1, logsumexp.shape[0])
