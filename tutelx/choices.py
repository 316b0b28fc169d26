"""What holds for one call: the caller's word, else a policy's, else the layer's setting.

Activation checkpointing makes a call again in the backward pass: then what held the first time, whatever a policy or a
planner has learnt since.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

import torch

from tutelx.policies import Policies
from tutelx.stats import RoutingStats
from tutelx.stopwatch import in_backward
from tutelx.types import Capacity, Decision, Plan, Planner

_MOST_CALLS = 256  # whose backward may be outstanding
_SAMPLE = 64  # numbers that tell one call's tokens from another's


@dataclass(frozen=True, kw_only=True)
class Choices:
    """top_k, plan: None: the gate's and the planner's own.

    again: the call is a recomputation. decision: of the first time, where it is known.
    """

    top_k: int | None
    capacity: Capacity
    plan: Plan | None
    again: bool = False
    decision: Decision | None = None


class Choosing:
    """Chooses for one layer, and remembers for as long as somebody may ask again. A copy starts without a memory."""

    def __init__(self) -> None:
        self._calls: deque[tuple[torch.Size, torch.Tensor, Choices]] = deque(maxlen=_MOST_CALLS)

    def __deepcopy__(self, memo: dict) -> Choosing:
        return Choosing()

    def __reduce__(self) -> tuple:
        return Choosing, ()

    def choose(
        self,
        x: torch.Tensor,
        *,
        top_k: int | None,
        capacity: Capacity | None,
        plan: Plan | None,
        setting: tuple[int | None, Capacity],
        policies: Policies | None,
        planner: Planner,
        num_experts: int,
        last: Decision | None,
    ) -> Choices:
        """top_k, capacity, plan: the caller's. setting: the layer's K and capacity. last: the decision before."""
        again = _may_change(policies, planner) and in_backward()
        if again and (found := self._find(x)) is not None:
            return found
        if policies is not None and not again:

            def seconds(k: int, rows: Capacity | None) -> float | None:
                return _seconds(planner, last, k, rows or setting[1])

            k, rows = policies.choose(num_experts, seconds)
            top_k = k if top_k is None else top_k
            capacity = rows if capacity is None else capacity
        top_k = setting[0] if top_k is None else top_k
        return Choices(top_k=top_k, capacity=setting[1] if capacity is None else capacity, plan=plan, again=again)

    def keep(
        self,
        x: torch.Tensor,
        chosen: Choices,
        decision: Decision,
        *,
        policies: Policies | None,
        planner: Planner,
        stats: RoutingStats,
        plans: bool,
    ) -> None:
        """After the call. plans: its plan is remembered here and nowhere else."""
        if chosen.again or not _may_change(policies, planner):
            return
        plan = decision.plan if plans else chosen.plan
        kept = replace(chosen, plan=plan, again=True, decision=decision)
        self._calls.append((x.shape, _sample(x), kept))
        if policies is not None:
            policies.saw(stats.load_over_ranks, decision.workload.tokens, decision.workload.top_k)

    def _find(self, x: torch.Tensor) -> Choices | None:
        """The latest for such tokens; waits for the device only where they differ."""
        alike = [(sample, kept) for shape, sample, kept in reversed(self._calls) if shape == x.shape]
        if not alike or len({(kept.top_k, kept.capacity, kept.plan) for _, kept in alike}) == 1:
            return alike[0][1] if alike else None
        own = _sample(x)
        return next((kept for sample, kept in alike if torch.equal(sample, own)), None)


def _may_change(policies: Policies | None, planner: Planner) -> bool:
    return policies is not None or getattr(planner, "wants_time", False)


def _sample(x: torch.Tensor) -> torch.Tensor:
    flat = x.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLE)][:_SAMPLE].clone()


def _seconds(planner: Planner, last: Decision | None, top_k: int, capacity: Capacity) -> float | None:
    """What a call like the last is expected to take with another K."""
    if last is None or not hasattr(planner, "seconds"):
        return None
    w = last.workload
    if w.world > 1 and hasattr(planner, "join"):  # what this rank knows is not yet what all know
        return None
    limit = capacity.limit(tokens=w.tokens, top_k=top_k, num_experts=w.num_experts)
    demand = None if w.demand is None else min(w.tokens, -(-w.demand * top_k // w.top_k))
    grad = torch.is_grad_enabled()
    return planner.seconds(replace(w, top_k=top_k, demand=demand, capacity=limit, training=grad))
