"""Calls of a few tokens without a gradient, as in decoding: they run as one operator, by a plan asked for once.

Such a call costs one read of its experts' weights, and what Python does around it counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import NamedTuple

import torch
from torch import nn

from tutelx import ops
from tutelx.experts import Experts
from tutelx.gates import Gate, TopKGate
from tutelx.ops._checks import wants_gradient
from tutelx.ops._library import calls
from tutelx.ops.few_tokens import are_few
from tutelx.stats import RoutingStats
from tutelx.stopwatch import are_timed
from tutelx.types import Capacity, Decision, Planner, Routing

_Key = tuple[int, int | None, torch.dtype, int, bool]
_Modules = dict[str, nn.Module | None]

# y [T, M], how it came about, and what makes its statistics.
BriefCall = tuple[torch.Tensor, Decision, Callable[[], RoutingStats]]


class _Step(NamedTuple):
    """What a call ran. arguments: of `ops.gated_inference_if_few`; state: of the modules that they are from."""

    decision: Decision
    arguments: tuple
    state: tuple


class BriefCalls:
    """One layer's, on one process. A copy starts without a memory."""

    def __init__(self) -> None:
        self._planner: Planner | None = None
        self._decisions: dict[_Key, Decision] = {}
        self.steps: dict[_Key, _Step] = {}  # all of the same modules; none where there is nothing to do again

    def __deepcopy__(self, memo: dict) -> BriefCalls:
        return BriefCalls()

    def __reduce__(self) -> tuple:
        return BriefCalls, ()

    def forget(self) -> None:
        """Lets go of the weights of the last calls, of which there may be others now."""
        self.steps = {}

    def again(
        self, x: torch.Tensor, modules: _Modules, top_k: int | None, capacity: Capacity, planner: Planner
    ) -> BriefCall | None:
        """What `gate_and_run` gives, sooner: if it ran such a call before, and the modules are as they were then."""
        step = self.steps.get(_key(x, top_k))
        if step is None or planner is not self._planner or not _is_quiet(capacity):
            return None
        return _run(step.decision, step.arguments, x) if calls.is_state_of(step.state, modules) else None

    def gate_and_run(
        self,
        x: torch.Tensor,
        gate: Gate,
        experts: Experts,
        modules: _Modules,
        top_k: int | None,
        capacity: Capacity,
        planner: Planner,
    ) -> BriefCall | None:
        """None if the call is not of this kind, the first with so many tokens, or the gate does more than a router.

        modules: the layer's own.
        """
        if planner is not self._planner or not isinstance(gate, TopKGate) or not _is_quiet(capacity):
            return None
        router = gate.router()
        if router is None:
            return None
        decision = self._decisions.get(_key(x, router.top_k if top_k is None else top_k))
        network = None if decision is None else experts.network()
        if decision is None or network is None:
            return None
        arguments = ops.gated_arguments(
            router.weight,
            network.weights,
            top_k=decision.workload.top_k,
            score=router.score,
            normalize=router.normalize,
            activation=network.activation,
            tile_rows=decision.plan.tile_rows,
            tile_columns=decision.plan.tile_columns,
        )
        found = _run(decision, arguments, x)
        if found is not None and isinstance(experts, Experts) and {gate, experts} <= set(modules.values()):
            self._keep_step(_key(x, top_k), decision, arguments, modules)
        return found

    def _keep_step(self, key: _Key, decision: Decision, arguments: tuple, modules: _Modules) -> None:
        state = next((step.state for step in self.steps.values()), None)
        if state is None or not calls.is_state_of(state, modules):
            self.steps, state = {}, calls.state_of(modules)
        self.steps[key] = _Step(decision, arguments, state)

    def run(
        self, x: torch.Tensor, routing: Routing, experts: Experts, capacity: Capacity, planner: Planner
    ) -> BriefCall | None:
        """The same after the gate."""
        if planner is not self._planner or not _is_brief(x, routing, capacity):
            return None
        decision = self._decisions.get(_key(x, routing.expert_ids.shape[1]))
        network = None if decision is None else experts.network()
        if decision is None or network is None or not _fits(network.weights, x):
            return None
        y, map = ops.inference(
            x,
            routing.expert_ids,
            routing.weights,
            network.weights,
            num_experts=decision.workload.num_experts,
            activation=network.activation,
            tile_rows=decision.plan.tile_rows,
            tile_columns=decision.plan.tile_columns,
        )
        return y, decision, partial(RoutingStats, map, routing)

    def keep(self, x: torch.Tensor, routing: Routing, capacity: Capacity, planner: Planner, decision: Decision) -> None:
        """After an ordinary call: the next ones with as many tokens may be brief, if its plan is what those run."""
        if not _is_brief(x, routing, capacity) or not getattr(planner, "steady", False):
            return
        if planner is not self._planner:
            self._planner, self._decisions = planner, {}
            self.forget()
        if (decision.plan.layout, decision.plan.expert_kernel) == ("ragged", "tiled"):
            reason = f"{decision.reason}; asked once for {x.shape[0]} tokens without a gradient"
            self._decisions[_key(x, routing.expert_ids.shape[1])] = replace(decision, reason=reason)


def _run(decision: Decision, arguments: tuple, x: torch.Tensor) -> BriefCall | None:
    found = ops.gated_inference_if_few(x, arguments)
    if found is None:
        return None
    y, fields = found
    return y, decision, lambda: RoutingStats(ops.GatedInference(*fields()).map)


def _is_quiet(capacity: Capacity) -> bool:
    """Nothing is dropped, and nobody wants to know how long it takes."""
    return capacity.mode == "dropless" and not are_timed()


def _is_brief(x: torch.Tensor, routing: Routing, capacity: Capacity) -> bool:
    return (
        are_few(x, routing.weights)
        and _is_quiet(capacity)
        and not torch.autograd._profiler_enabled()
        and routing.capacity is None
        and routing.expert_ids.dtype == torch.int32
    )


def _fits(weights: ops.ExpertWeights, x: torch.Tensor) -> bool:
    return weights.up[0].dtype == x.dtype and not wants_gradient(*chain.from_iterable(weights.lists()))


def _key(x: torch.Tensor, top_k: int | None) -> _Key:
    return x.shape[0], top_k, x.dtype, torch.get_num_threads(), torch.is_grad_enabled()
