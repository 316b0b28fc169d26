"""The auxiliary losses of a script's layer. T tokens, K choices a token, E experts."""

from __future__ import annotations

import torch

from tutelx.errors import InvalidValueError
from tutelx.gates.losses import cv_squared, switch_balance


def gshard_loss(scores_w_noise: torch.Tensor, top_ids: torch.Tensor) -> torch.Tensor:
    """E * sum_i f_i * P_i: f the share of first choices, P the mean score; 0 for an empty batch.

    Args:
        scores_w_noise: [T, E] softmax of the logits. top_ids: [T, K], best first.
    """
    return switch_balance(top_ids, scores_w_noise.sum(dim=0))


def load_importance_loss(
    scores_wo_noise: torch.Tensor, topk_logits: torch.Tensor, num_global_experts: int, gate_noise: float
) -> torch.Tensor:
    """(CV^2(importance) + CV^2(load)) / 2, with unbiased variances (Shazeer et al. 2017, after their equations 6-11).

    load_i = sum_t Phi((scores[t, i] - threshold[t]) * E / gate_noise), the threshold being the last of `topk_logits`.

    Args:
        scores_wo_noise: [T, E]. topk_logits: [T, K], those of the chosen experts, with noise.

    Raises:
        InvalidValueError: `gate_noise` is not above 0.
    """
    if not gate_noise > 0:
        raise InvalidValueError(f"gate_noise={gate_noise} must be above 0 for load_importance_loss")
    scores = scores_wo_noise if scores_wo_noise.dtype == torch.float64 else scores_wo_noise.float()
    above = (scores - topk_logits[:, -1:].to(scores.dtype)) * (num_global_experts / gate_noise)
    load = torch.special.ndtr(above).sum(dim=0)
    return (cv_squared(scores.sum(dim=0), unbiased=True) + cv_squared(load, unbiased=True)) / 2
