"""From scores to the routing that a script's encode and decode take. T tokens, K choices a token, E experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from tutelx import ops
from tutelx.errors import InvalidValueError
from tutelx.gates import by_priority
from tutelx.integrations.tutel import counts
from tutelx.integrations.tutel.dispatcher import Critical, map_of
from tutelx.integrations.tutel.losses import gshard_loss
from tutelx.integrations.tutel.ranks import most_of

if TYPE_CHECKING:
    import torch.distributed as dist

LossFn = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def extract_critical(
    scores: torch.Tensor,
    top_k: int,
    loss_fn: LossFn | None = gshard_loss,
    capacity_factor: float = 1.0,
    batch_prioritized_routing: bool = False,
    normalize_gate: bool = True,
    alignment: int = 1,
    group: dist.ProcessGroup | None = None,
    inequivalent_tokens: bool = False,
) -> tuple[Critical, torch.Tensor | None]:
    """The K best experts of every token, their weights, and a location in each.

    Args:
        scores: [T, E] positive, as a softmax gives them. Differentiable through weights and loss.
        top_k: K; more than E means E.
        loss_fn: of scores and the chosen experts [T, K]; None for no loss.
        capacity_factor: > 0 fixed, 0 what the fullest expert of any rank needs, < 0 that, but at most -factor.
        batch_prioritized_routing: locations by descending best score, not in the order of the tokens.
        normalize_gate: divides the weights of a token by their sum, if there are two or more.
        alignment: what the capacity is a multiple of.
        group: of the ranks that must agree on the capacity; default all. Asked where the factor is not above 0, and
            with `inequivalent_tokens`, which takes the most tokens of any rank.

    Returns:
        (E, experts, locations, weights, C, asked), loss: for each choice three tensors [T], the first two int32;
        `asked` [E] counts slots before any drop, and its attribute `topk_ids` [T, K] holds the experts.

    Raises:
        InvalidValueError, InvalidTypeError: scores that are not [T, E], a `top_k` or an `alignment` below 1, a factor
            that is not finite. ValueError: a score is NaN.
    """
    if not isinstance(scores, torch.Tensor) or scores.dim() != 2:
        raise InvalidValueError(f"scores has shape {tuple(getattr(scores, 'shape', ()))}, expected [T, E]")
    if alignment < 1:
        raise InvalidValueError(f"alignment={alignment} must be at least 1")
    tokens, num_experts = scores.shape
    capacity = counts.setting(capacity_factor)
    top_k = min(top_k, num_experts)
    ids_TK = ops.gate(scores.detach(), top_k).expert_ids
    weights_TK = scores.gather(1, ids_TK.long())
    if normalize_gate and top_k > 1:
        least = torch.finfo(scores.dtype).eps
        weights_TK = weights_TK / weights_TK.sum(dim=1, keepdim=True).clamp(min=least)
    loss = None if loss_fn is None else loss_fn(scores, ids_TK.long())

    order = by_priority(scores.amax(dim=1)) if batch_prioritized_routing else None
    map = ops.route(ids_TK, num_experts, layout="ragged", order=order)
    location_TK = map.dest - map.offsets[ids_TK.long()]

    if inequivalent_tokens:
        tokens = most_of(tokens, scores.device, group)
    limit = counts.rows(capacity_factor, tokens=tokens, top_k=top_k, num_experts=num_experts, alignment=alignment)
    if capacity.mode != "fixed":
        needed = counts.align(max(1, most_of(map.counts.max(), scores.device, group)), alignment)
        limit = needed if limit is None else min(needed, limit)
    assert limit is not None
    asked = map.counts.long()
    asked.topk_ids = ids_TK.long()  # type: ignore[attr-defined]
    experts, locations, weights = (list(each.unbind(1)) for each in (ids_TK, location_TK, weights_TK))
    return (num_experts, experts, locations, weights, limit, asked), loss


top_k_routing = extract_critical


def get_dispatch_count(critial_data: Critical) -> torch.Tensor:
    """[E], the slots that asked for each expert, before any drop."""
    return critial_data[-1]


def get_topk_selection(critial_data: Critical) -> tuple[torch.Tensor, torch.Tensor]:
    """The chosen experts [T, K], and the slots that asked for each expert [E]."""
    return critial_data[-1].topk_ids, critial_data[-1]  # type: ignore[attr-defined]


def get_reversed_sample_ids(critial_data: Critical, return_id_type: str = "sample_id") -> torch.Tensor:
    """[E, C] int32: the token whose row it is, or with "top_id" which of its choices; -1 where a row is empty.

    Raises:
        InvalidValueError: another `return_id_type`.
    """
    if return_id_type not in ("sample_id", "top_id"):
        raise InvalidValueError(f"return_id_type={return_id_type!r} is neither 'sample_id' nor 'top_id'")
    num_experts, indices, locations, _, capacity, _ = critial_data
    source, top_k = map_of(num_experts, indices, locations, capacity).source, len(indices)
    found = source // top_k if return_id_type == "sample_id" else source % top_k
    return torch.where(source < 0, source, found).view(num_experts, capacity)


def fast_cumsum_sub_one(data: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """data [T, E] -> its running sums over the tokens, minus one: the location of each slot of a one-hot mask.

    Raises:
        InvalidValueError: data of another rank, or another dimension than the first.
    """
    if data.dim() != 2 or dim != 0:
        raise InvalidValueError(f"data has shape {tuple(data.shape)} and dim={dim}, expected [T, E] and dim=0")
    return data.cumsum(dim=0) - 1
