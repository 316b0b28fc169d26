"""Checks of gates whose experts lie in groups of equally many."""

from __future__ import annotations

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
