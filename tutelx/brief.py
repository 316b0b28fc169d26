"""Calls of a few tokens without a gradient, as in decoding: they run as one operator, by a plan asked for once.

Such a call costs one read of its experts' weights, and what Python does around it counts.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

import torch

from tutelx import ops
from tutelx.experts import Experts
from tutelx.ops._checks import wants_gradient
from tutelx.ops.few_tokens import are_few
from tutelx.stopwatch import are_timed
from tutelx.types import Capacity, Decision, DispatchMap, Planner, Routing

_Key = tuple[int, int, torch.dtype, int, bool]


class BriefCalls:
    """One layer's, on one process. A copy starts without a memory."""

    def __init__(self) -> None:
        self._planner: Planner | None = None
        self._decisions: dict[_Key, Decision] = {}

    def __deepcopy__(self, memo: dict) -> BriefCalls:
        return BriefCalls()

    def __reduce__(self) -> tuple:
        return BriefCalls, ()

    def run(
        self, x: torch.Tensor, routing: Routing, experts: Experts, capacity: Capacity, planner: Planner
    ) -> tuple[torch.Tensor, DispatchMap, Decision] | None:
        """y [T, M] and how it came about; None if the call is not of this kind, or the first with so many tokens."""
        if planner is not self._planner or not _is_brief(x, routing, capacity):
            return None
        decision = self._decisions.get(_key(x, routing))
        network = None if decision is None else experts.network()
        if decision is None or network is None or not _fits(network.weights, x):
            return None
        plan = decision.plan
        y, map = ops.inference(
            x,
            routing.expert_ids,
            routing.weights,
            network.weights,
            num_experts=decision.workload.num_experts,
            activation=network.activation,
            tile_rows=plan.tile_rows,
            tile_columns=plan.tile_columns,
        )
        return y, map, decision

    def keep(self, x: torch.Tensor, routing: Routing, capacity: Capacity, planner: Planner, decision: Decision) -> None:
        """After an ordinary call: the next ones with as many tokens may be brief, if its plan is what those run."""
        if not getattr(planner, "steady", False) or not _is_brief(x, routing, capacity):
            return
        if planner is not self._planner:
            self._planner, self._decisions = planner, {}
        if (decision.plan.layout, decision.plan.expert_kernel) == ("ragged", "tiled"):
            reason = f"{decision.reason}; asked once for {x.shape[0]} tokens without a gradient"
            self._decisions[_key(x, routing)] = replace(decision, reason=reason)


def _is_brief(x: torch.Tensor, routing: Routing, capacity: Capacity) -> bool:
    return (
        are_few(x, routing.weights)
        and capacity.mode == "dropless"
        and routing.capacity is None
        and routing.expert_ids.dtype == torch.int32
        and not are_timed()
        and not torch.autograd._profiler_enabled()
    )


def _fits(weights: ops.ExpertWeights, x: torch.Tensor) -> bool:
    return weights.up[0].dtype == x.dtype and not wants_gradient(*chain.from_iterable(weights.lists()))


def _key(x: torch.Tensor, routing: Routing) -> _Key:
    return x.shape[0], routing.expert_ids.shape[1], x.dtype, torch.get_num_threads(), torch.is_grad_enabled()
