"""Auxiliary losses of a gate, without their coefficients. T tokens, K choices a token, E experts.

All are computed in float32 (float64 for float64 scores) and return a scalar; an empty batch gives 0. Ids of -1 are
unused slots. `group` makes a loss that of all ranks' tokens together: the sums are reduced, once, before they are
multiplied; every rank of the group must call it. Without a group it is that of the tokens given.
"""

from __future__ import annotations

from typing import Any

import torch

from tutelx.errors import InvalidValueError
from tutelx.gates.statistics import batch_over_ranks, expert_counts, expert_sums, over_ranks


def importance(
    expert_ids: torch.Tensor, weights: torch.Tensor, num_experts: int, *, unbiased: bool = False, group: Any = None
) -> torch.Tensor:
    """CV^2 of each expert's sum of gate weights, sum_x G(x)_i (Shazeer et al. 2017, eq. 6-7; its w is 0.1).

    The batch X of the paper is that of all devices together: pass `group`.

    Args:
        expert_ids: [T, K]. weights: [T, K], differentiable.
        unbiased: the variance divides by E - 1 and not by E, which is the default.
    """
    (sums,) = over_ranks(group, expert_sums(expert_ids, weights, num_experts))
    return cv_squared(sums, unbiased=unbiased)


def load(
    clean: torch.Tensor,
    noisy: torch.Tensor,
    noise_std: torch.Tensor,
    top_k: int,
    *,
    unbiased: bool = False,
    group: Any = None,
) -> torch.Tensor:
    """CV^2 of load_i = sum_x P(x, i), the smooth count of an expert's tokens (Shazeer et al. 2017, eq. 8-11).

    P(x, i) = Phi((clean_i - kth_excluding(noisy, k, i)) / noise_std_i) is the chance that expert i stays among the K
    best if only its own noise is drawn anew; the k-th greatest of the others is the (k+1)-th of all for an expert that
    is chosen, and the k-th for one that is not. With K = E every P is 1. The batch is that of all devices.

    Args:
        clean, noisy: [T, E] logits without and with noise. noise_std: [T, E], positive. top_k: K.
    """
    return cv_squared(*over_ranks(group, smooth_load(clean, noisy, noise_std, top_k)), unbiased=unbiased)


def smooth_load(clean: torch.Tensor, noisy: torch.Tensor, noise_std: torch.Tensor, top_k: int) -> torch.Tensor:
    """[E], the load of :func:`load` before its coefficient of variation."""
    tokens, num_experts = clean.shape
    clean, noisy, noise_std = (_wide(each) for each in (clean, noisy, noise_std))
    if top_k >= num_experts:
        return torch.full_like(clean[:1].sum(0), float(tokens)) + 0.0 * clean.sum(0)
    best = noisy.topk(top_k + 1, dim=1).values
    # Equal logits on both sides of the border have equal thresholds, so which of them was chosen does not matter.
    others = torch.where(noisy > best[:, -1:], best[:, -1:], best[:, -2:-1])
    return torch.special.ndtr((clean - others) / noise_std).sum(dim=0)


def gshard_balance(expert_ids: torch.Tensor, score_sum: torch.Tensor, *, group: Any = None) -> torch.Tensor:
    """1/E * sum_e (c_e / S) * m_e (GShard, algorithm 1): 1/E^2 when routing is uniform; E^2 times it is Switch's form.

    c_e counts the first choices before any drop (no gradient), m_e is the mean of the softmax over the S tokens. Each
    local group of the paper has its own: call it for each, without `group`.

    Args:
        expert_ids: [S, K], best first. score_sum: [E], the sum over tokens of the softmax.
    """
    return switch_balance(expert_ids, score_sum, group=group) / score_sum.shape[0] ** 2


def switch_balance(expert_ids: torch.Tensor, score_sum: torch.Tensor, *, group: Any = None) -> torch.Tensor:
    """E * sum_i f_i * P_i (Switch Transformers, eq. 4; its alpha is 1e-2); 1 when routing is uniform.

    f_i is the share of tokens whose first choice is expert i (no gradient), P_i the mean probability of i. The paper's
    batch is that of one core; `group` takes that of all.

    Args:
        expert_ids: [T, K], best first. score_sum: [E], the sum over tokens of the gate's probabilities.
    """
    num_experts = score_sum.shape[0]
    first = expert_counts(expert_ids[:, 0], num_experts)
    (first, score_sum), tokens = batch_over_ranks(group, expert_ids.shape[0], first, _wide(score_sum))
    return torch.dot(first.to(score_sum.dtype), score_sum) * (num_experts / tokens**2)


def router_z(logsumexp: torch.Tensor, *, group: Any = None) -> torch.Tensor:
    """Mean over tokens of logsumexp^2 (ST-MoE, eq. 5; its coefficient is 1e-3).

    Args:
        logsumexp: [T], of each token's router logits.
    """
    (total,), tokens = batch_over_ranks(group, logsumexp.shape[0], _wide(logsumexp).square().sum())
    return total / tokens


def expert_balance(expert_ids: torch.Tensor, score_sum: torch.Tensor, *, group: Any = None) -> torch.Tensor:
    """sum_i f_i * P_i with f_i = E/(K*T) * count_i (DeepSeekMoE, eq. 12-14); 1 when routing is uniform.

    count_i counts all K choices (no gradient), P_i is the mean score. Local in the paper; shared experts do not count.

    Args:
        expert_ids: [T, K]. score_sum: [E], the sum over tokens of the scores.
    """
    return torch.dot(*_shares_of_batch(expert_ids, score_sum, group))


def device_balance(
    expert_ids: torch.Tensor, score_sum: torch.Tensor, num_devices: int, *, group: Any = None
) -> torch.Tensor:
    """sum_d f'_d * P'_d: f' the mean of f over a device's experts, P' the sum of P (DeepSeekMoE, eq. 15-17).

    Args:
        expert_ids: [T, K]. score_sum: [E]. num_devices: D; device d holds experts d*E/D .. (d+1)*E/D - 1.
    """
    return _device_balance(*_shares_of_batch(expert_ids, score_sum, group), num_devices)


def communication_balance(
    expert_ids: torch.Tensor, score_sum: torch.Tensor, num_devices: int, device_limit: int, *, group: Any = None
) -> torch.Tensor:
    """sum_d f''_d * P''_d with f''_d = D/(M*T) * tokens sent to device d (DeepSeek-V2, eq. 29-31).

    A token that has several experts on a device is sent there once. P'' is the sum of P.

    Args:
        expert_ids: [T, K]. score_sum: [E]. num_devices: D, as in :func:`device_balance`.
        device_limit: M, the most devices a token may go to.
    """
    sent = _tokens_sent(expert_ids, score_sum, num_devices)
    (sent, score_sum), tokens = batch_over_ranks(group, expert_ids.shape[0], sent, _wide(score_sum))
    return _communication_balance(sent, score_sum / tokens, tokens, device_limit)


def device_limited_balances(
    expert_ids: torch.Tensor, score_sum: torch.Tensor, num_devices: int, device_limit: int, *, group: Any = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """:func:`expert_balance`, :func:`device_balance` and :func:`communication_balance`, of one reduction."""
    tokens_here, top_k = expert_ids.shape
    counts = expert_counts(expert_ids, score_sum.shape[0])
    sent = _tokens_sent(expert_ids, score_sum, num_devices)
    (counts, sent, score_sum), tokens = batch_over_ranks(group, tokens_here, counts, sent, _wide(score_sum))
    f, P = _shares(counts, score_sum, top_k, tokens)
    return torch.dot(f, P), _device_balance(f, P, num_devices), _communication_balance(sent, P, tokens, device_limit)


def sequence_balance(
    expert_ids: torch.Tensor, scores: torch.Tensor, sequence_length: int | None = None
) -> torch.Tensor:
    """Mean over sequences of sum_i f_i * P_i (DeepSeek-V3, eq. 17-20; its alpha is 1e-4); 1 when routing is uniform.

    Inside one sequence of S tokens, f_i = E/(K*S) * count_i and P_i is the mean of the scores after each token's are
    divided by their sum. Local by definition: a sequence lies on one rank.

    Args:
        expert_ids: [T, K]. scores: [T, E], positive. sequence_length: S, a divisor of T; None: T.
    """
    (tokens, top_k), num_experts = expert_ids.shape, scores.shape[1]
    length = sequence_length or max(1, tokens)
    if tokens % length:
        raise InvalidValueError(f"T={tokens} tokens are no multiple of sequence_length={length}")
    sequences = tokens // length
    if sequences == 0:
        return scores.sum() * 0.0
    scores = _wide(scores)
    ids = expert_ids
    if sequences > 1:  # sequence s counts its experts as s*E .. s*E + E - 1
        sequence = torch.arange(tokens, device=ids.device).div(length, rounding_mode="floor").unsqueeze(1)
        ids = torch.where(ids >= 0, ids + sequence * num_experts, -1)
    counts = expert_counts(ids, sequences * num_experts).view(sequences, num_experts)
    P = (scores / scores.sum(dim=1, keepdim=True)).view(sequences, length, num_experts).mean(dim=1)
    return (counts * P).sum() * (num_experts / (top_k * length * sequences))


def cv_squared(values: torch.Tensor, *, unbiased: bool = False) -> torch.Tensor:
    """Variance over squared mean of [..., E], positive; 0 where E is 1 or all are 0. It divides by E, or by E - 1."""
    if values.shape[-1] == 1:
        return values.sum(dim=-1) * 0.0
    tiny = torch.finfo(values.dtype).tiny
    return values.var(dim=-1, correction=int(unbiased)) / values.mean(dim=-1).square().clamp_min(tiny)


def _shares(
    counts: torch.Tensor, score_sum: torch.Tensor, top_k: int, tokens: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """f [E] and P [E] of DeepSeekMoE. tokens: T of all ranks, a number or a tensor."""
    return counts.to(score_sum.dtype) * (counts.shape[0] / (top_k * tokens)), score_sum / tokens


def _shares_of_batch(
    expert_ids: torch.Tensor, score_sum: torch.Tensor, group: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens_here, top_k = expert_ids.shape
    counts = expert_counts(expert_ids, score_sum.shape[0])
    (counts, score_sum), tokens = batch_over_ranks(group, tokens_here, counts, _wide(score_sum))
    return _shares(counts, score_sum, top_k, tokens)


def _device_balance(f: torch.Tensor, P: torch.Tensor, num_devices: int) -> torch.Tensor:
    per_device = _per_device(f.shape[0], num_devices)
    return torch.dot(f.view(num_devices, per_device).mean(1), P.view(num_devices, per_device).sum(1))


def _tokens_sent(expert_ids: torch.Tensor, score_sum: torch.Tensor, num_devices: int) -> torch.Tensor:
    """[D], the tokens that have an expert on a device."""
    per_device = _per_device(score_sum.shape[0], num_devices)
    # One place in front for unused slots.
    devices = torch.div(expert_ids, per_device, rounding_mode="floor").long() + 1
    sent = score_sum.detach().new_zeros((expert_ids.shape[0], num_devices + 1))
    return sent.scatter_(1, devices, 1.0).sum(dim=0)[1:]


def _communication_balance(sent: torch.Tensor, P: torch.Tensor, tokens: Any, device_limit: int) -> torch.Tensor:
    num_devices = sent.shape[0]
    f = sent.to(P.dtype) * (num_devices / (device_limit * tokens))
    return torch.dot(f, P.view(num_devices, -1).sum(1))


def _per_device(num_experts: int, num_devices: int) -> int:
    if num_devices < 1 or num_experts % num_devices:
        raise InvalidValueError(f"num_experts={num_experts} is no multiple of num_devices={num_devices}")
    return num_experts // num_devices


def _wide(values: torch.Tensor) -> torch.Tensor:
    return values if values.dtype == torch.float64 else values.float()
