"""The best experts inside the best groups of experts. T tokens, E experts in G groups of n, K choices."""

from __future__ import annotations

import torch

from tutelx import ops
from tutelx.errors import InvalidValueError
from tutelx.gates.base import check_at_most, check_ints


def check_groups(num_groups: int, kept_groups: int) -> None:
    check_ints(num_groups=num_groups, kept_groups=kept_groups)
    if kept_groups > num_groups:
        raise InvalidValueError(f"kept_groups={kept_groups} exceeds num_groups={num_groups}")


def check_experts(num_experts: int, num_groups: int, kept_groups: int, k: int) -> None:
    check_at_most("k", k, num_experts)
    if num_experts % num_groups:
        raise InvalidValueError(f"num_experts={num_experts} is no multiple of num_groups={num_groups}")
    inside = kept_groups * (num_experts // num_groups)
    if k > inside:
        raise InvalidValueError(f"k={k} exceeds the {inside} experts of kept_groups={kept_groups} groups")


def choose_in_groups(
    values: torch.Tensor, top_k: int, *, num_groups: int, kept_groups: int, best_of_group: int
) -> torch.Tensor:
    """The K greatest of a token's values among those in its best groups: ids [T, K] int32, best first.

    Groups that are not kept are left out of the second choice altogether. Multiplying their values by 0 would let them
    win over negative ones. Among equals the lower index wins, of groups and of experts.

    Args:
        values: [T, E]; no gradient. best_of_group: a group's score is the sum of this many of its greatest values.
    """
    values = values.detach()
    tokens, num_experts = values.shape
    check_experts(num_experts, num_groups, kept_groups, top_k)
    if kept_groups == num_groups:
        return ops.gate(values, top_k).expert_ids
    size = num_experts // num_groups
    grouped = values.view(tokens, num_groups, size)
    best = grouped.amax(dim=2) if best_of_group == 1 else grouped.topk(min(best_of_group, size), dim=2).values.sum(2)
    # Ascending, so that positions inside the kept groups are in the order of experts.
    kept = ops.gate(best, kept_groups).expert_ids.long().sort(dim=1).values
    inside = grouped.gather(1, kept.unsqueeze(2).expand(-1, -1, size)).flatten(1)
    found = ops.gate(inside, top_k).expert_ids.long()
    return (kept.gather(1, found // size) * size + found % size).int()
