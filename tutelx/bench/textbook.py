"""Gates as pseudo-code and most repositories write them: one-hot masks [T, E] and running counts of them.

Each takes logits [T, E] (or what the gate has instead), the gate's settings, K and C, and gives the weights [T, E] of
the choices that got a row, and the auxiliary loss. T tokens, E experts, K choices, C rows an expert.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

Result = tuple[torch.Tensor, torch.Tensor]


def with_room(masks: list[torch.Tensor], rows: int) -> list[torch.Tensor]:
    """Of each choice's one-hot mask, what comes before its expert is full; all first choices before any second."""
    kept, taken = [], torch.zeros_like(masks[0][:1])
    for mask in masks:
        place = mask.cumsum(dim=0) - 1 + taken
        kept.append(mask * (place < rows))
        taken = taken + mask.sum(dim=0, keepdim=True)
    return kept


def combine(ids: torch.Tensor, weights: torch.Tensor, num_experts: int, rows: int, sent=None) -> torch.Tensor:
    """[T, E]. sent: [T, K] choices that are dispatched at all; they are counted all the same."""
    kept = with_room([F.one_hot(ids[:, k], num_experts) for k in range(ids.shape[1])], rows)
    parts = [mask * weights[:, k : k + 1] for k, mask in enumerate(kept)]
    if sent is not None:
        parts = [part * sent[:, k : k + 1] for k, part in enumerate(parts)]
    return torch.stack(parts).sum(dim=0)


def balance(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    share = F.one_hot(ids[:, 0], scores.shape[1]).to(scores.dtype).mean(dim=0)
    return scores.shape[1] * (share * scores.mean(dim=0)).sum()


def topk(logits: torch.Tensor, config: Any, k: int, rows: int) -> Result:
    scores = logits.softmax(dim=1)
    chosen, ids = scores.topk(k, dim=1)
    weights = chosen / chosen.sum(dim=1, keepdim=True)
    return combine(ids, weights, logits.shape[1], rows), config.balance_coef * balance(ids, scores)


def switch(logits: torch.Tensor, config: Any, k: int, rows: int) -> Result:
    scores = logits.softmax(dim=1)
    weights, ids = scores.topk(k, dim=1)
    return combine(ids, weights, logits.shape[1], rows), config.balance_coef * balance(ids, scores)


def noisy_topk(clean: torch.Tensor, noise: torch.Tensor, config: Any, k: int, rows: int) -> Result:
    """noise: [T, E] logits of the noise."""
    std = F.softplus(noise)
    h = clean + torch.randn_like(clean) * std
    best, ids = h.topk(min(k + 1, h.shape[1]), dim=1)
    masked = torch.full_like(h, -torch.inf).scatter(1, ids[:, :k], best[:, :k])
    weights = masked.softmax(dim=1)
    inside = h > best[:, k:] if k < h.shape[1] else torch.ones_like(h, dtype=torch.bool)
    others = torch.where(inside, best[:, -1:], best[:, k - 1 : k])
    load = torch.special.ndtr((clean - others) / std).sum(dim=0) if k < h.shape[1] else torch.ones_like(h).sum(0)
    aux = config.importance_coef * _cv_squared(weights.sum(dim=0)) + config.load_coef * _cv_squared(load)
    return combine(ids[:, :k], weights.gather(1, ids[:, :k]), h.shape[1], rows), aux


def gshard(logits: torch.Tensor, config: Any, k: int, rows: int) -> Result:
    scores = logits.softmax(dim=1)
    chosen, ids = scores.topk(k, dim=1)
    weights = chosen / chosen.sum(dim=1, keepdim=True)
    sent = torch.ones_like(weights, dtype=torch.bool)
    sent[:, 1:] = 2 * weights[:, 1:] > torch.rand_like(weights[:, 1:])
    aux = config.balance_coef * balance(ids, scores) / logits.shape[1] ** 2
    return combine(ids, weights, logits.shape[1], rows, sent), aux


def st_moe(logits: torch.Tensor, config: Any, k: int, rows: int) -> Result:
    scores = logits.softmax(dim=1)
    chosen, ids = scores.topk(k, dim=1)
    weights = chosen / chosen.sum(dim=1, keepdim=True)
    masks = [F.one_hot(ids[:, i], logits.shape[1]) for i in range(k)]
    draws = torch.rand_like(weights[:, 1:])
    sent = weights[:, 1:] > config.threshold * weights[:, :1] * draws
    masks = [masks[0], *(mask * sent[:, i : i + 1] for i, mask in enumerate(masks[1:]))]
    kept = with_room(masks, rows)
    dense = torch.stack([mask * weights[:, i : i + 1] for i, mask in enumerate(kept)]).sum(dim=0)
    z = logits.logsumexp(dim=1).square().mean()
    return dense, config.balance_coef * balance(ids, scores) + config.z_coef * z


def expert_choice(logits: torch.Tensor, config: Any, k: int, rows: int) -> Result:
    scores = logits.softmax(dim=1)
    tokens = scores.T.sort(dim=1, descending=True, stable=True).indices[:, :rows]
    mask = torch.zeros_like(scores).scatter(0, tokens.T, 1.0)
    return mask * scores, scores.new_zeros(())


def group_limited(logits: torch.Tensor, config: Any, k: int, rows: int) -> Result:
    (tokens, num_experts), groups = logits.shape, config.num_groups
    scores = logits.softmax(dim=1)
    best = scores.view(tokens, groups, -1).amax(dim=2)
    weights, ids = _inside(scores, best, config).topk(k, dim=1)
    share = F.one_hot(ids, num_experts).sum(dim=1).to(scores.dtype).mean(dim=0) * num_experts / k
    mean = scores.mean(dim=0)
    aux = config.balance_coef * (share * mean).sum()
    device = (share.view(groups, -1).mean(dim=1) * mean.view(groups, -1).sum(dim=1)).sum()
    to_device = F.one_hot(ids // (num_experts // groups), groups).amax(dim=1).to(scores.dtype).mean(dim=0)
    sent = (to_device * groups / config.kept_groups * mean.view(groups, -1).sum(dim=1)).sum()
    aux = aux + config.device_coef * device + config.communication_coef * sent
    return combine(ids, config.scale * weights, num_experts, rows), aux


def bias_balanced(logits: torch.Tensor, bias: torch.Tensor, config: Any, k: int, rows: int) -> Result:
    (tokens, num_experts), groups = logits.shape, config.num_groups
    scores = logits.sigmoid()
    biased = scores.detach() + bias
    grouped = biased.view(tokens, groups, -1)
    best = grouped.topk(min(2, grouped.shape[2]), dim=2).values.sum(dim=2)
    ids = _inside(biased, best, config).topk(k, dim=1).indices
    weights = scores.gather(1, ids)
    weights = config.scale * weights / weights.sum(dim=1, keepdim=True)
    share = F.one_hot(ids, num_experts).sum(dim=1).to(scores.dtype).mean(dim=0) * num_experts / k
    aux = config.sequence_coef * (share * (scores / scores.sum(dim=1, keepdim=True)).mean(dim=0)).sum()
    return combine(ids, weights, num_experts, rows), aux


def top_p(logits: torch.Tensor, config: Any, k: int, rows: int) -> Result:
    scores = logits.softmax(dim=1)
    ordered, ids = scores.sort(dim=1, descending=True)
    taken = ordered.detach().cumsum(dim=1) - ordered.detach() < config.p
    taken[:, k:] = False
    masks = [F.one_hot(ids[:, i], logits.shape[1]) * taken[:, i : i + 1] for i in range(k)]
    dense = torch.stack(with_room(masks, rows)).sum(dim=0) * scores
    return dense, config.balance_coef * balance(ids, scores)


def hierarchical(of_groups: torch.Tensor, of_experts: torch.Tensor, config: Any, k: int, rows: int) -> Result:
    """All groups' inner gates, masked by the outer one."""
    tokens, num_experts = of_experts.shape
    outer = _keep_softmax(of_groups, config.kept_groups)
    inner = _keep_softmax(of_experts.view(tokens, of_groups.shape[1], -1), config.k_inside)
    weights = (outer.unsqueeze(2) * inner).view(tokens, num_experts)
    chosen, ids = weights.topk(k, dim=1)
    return combine(ids, chosen, num_experts, rows), config.importance_coef * _cv_squared(weights.sum(dim=0))


def _inside(values: torch.Tensor, best: torch.Tensor, config: Any) -> torch.Tensor:
    """Values of the best groups, -inf elsewhere."""
    kept = best.topk(config.kept_groups, dim=1).indices
    mask = torch.zeros_like(best, dtype=torch.bool).scatter(1, kept, True)
    return values.masked_fill(~mask.repeat_interleave(values.shape[1] // best.shape[1], dim=1), -torch.inf)


def _keep_softmax(logits: torch.Tensor, k: int) -> torch.Tensor:
    best, ids = logits.topk(k, dim=-1)
    return torch.full_like(logits, -torch.inf).scatter(-1, ids, best).softmax(dim=-1)


def _cv_squared(values: torch.Tensor) -> torch.Tensor:
    if values.shape[0] == 1:
        return values.sum() * 0
    return values.var(correction=0) / values.mean().square()
