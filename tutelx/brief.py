"""Calls of a few tokens without a gradient, as in decoding: they run as one operator, by a plan asked for once.

Such a call costs one read of its experts' weights, and what Python does around it counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import NamedTuple, cast

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

_state_of = getattr(calls, "state_of", None)  # a build without Python's headers has none

_Key = tuple[int, torch.dtype, int, bool]

# y, how it came about, and what makes its statistics.
Brief = tuple[torch.Tensor, Decision, Callable[[], RoutingStats]]

# The attributes of a layer that say how it runs. What it is made of besides are its modules.
SETTINGS = (
    "batch_prioritized",
    "capacity",
    "eval_capacity",
    "model_dim",
    "planner",
    "policies",
    "ranks",
    "top_k",
    "training",
)


class _Kept(NamedTuple):
    """A call that ran. top_k: as it was asked for."""

    top_k: int | None
    call: ops.BriefCall
    decision: Decision


class _Memory(NamedTuple):
    """Calls, the last one first, and the state of the layer that all of them are of. Never changed: another thread may
    be running one of them."""

    state: tuple = ()
    calls: tuple[_Kept, ...] = ()


class BriefCalls:
    """One layer's, on one process. A copy starts without a memory."""

    def __init__(self) -> None:
        self._planner: Planner | None = None
        self._decisions: dict[_Key, dict[int, Decision]] = {}  # by the choices a token
        self._memory = _Memory()

    def __deepcopy__(self, memo: dict) -> BriefCalls:
        return BriefCalls()

    def __reduce__(self) -> tuple:
        return BriefCalls, ()

    def forget(self) -> None:
        """Lets go of the weights of the last calls, of which there may be others now."""
        self._memory = _Memory()

    def again(self, layer: nn.Module, x: object, top_k: int | None) -> Brief | None:
        """What `gate_and_run` gives, sooner, for x [..., M]: if it ran such a call before, and the layer is as it was
        then."""
        memory = self._memory
        if not memory.calls or are_timed():
            return None
        found = calls.again(layer, SETTINGS, memory.state, memory.calls, x, top_k)
        if found is None:
            return None
        y, decision, fields = found
        return y, decision, _stats_of(fields)

    def gate_and_run(
        self,
        x: torch.Tensor,
        gate: Gate,
        experts: Experts,
        layer: nn.Module,
        top_k: int | None,
        capacity: Capacity,
        planner: Planner,
    ) -> Brief | None:
        """y for x [..., M]. None if the call is not of this kind, the first with so many tokens, or the gate does more
        than a router."""
        if torch.compiler.is_compiling() or planner is not self._planner:
            return None
        if not isinstance(gate, TopKGate) or not _is_quiet(capacity):
            return None
        decisions = self._decisions.get(_key(x))
        if decisions is None:
            return None
        is_own = isinstance(experts, Experts) and {gate, experts} <= set(layer._modules.values())
        memory = self._memory_of(layer) if is_own else None
        router = gate.router()
        if router is None:
            return None
        k = cast("int | None", layer.top_k) if top_k is None else top_k
        decision = decisions.get(router.top_k if k is None else k)
        network = None if decision is None else experts.network()
        if decision is None or network is None:
            return None
        call = ops.brief_call(
            x,
            router.weight,
            network.weights,
            top_k=decision.workload.top_k,
            score=router.score,
            normalize=router.normalize,
            activation=network.activation,
            tile_rows=decision.plan.tile_rows,
            tile_columns=decision.plan.tile_columns,
        )
        found = None if call is None else call.run(x)
        if call is None or found is None:
            return None
        if memory is not None:
            others = [other for other in memory.calls if other.top_k != top_k or not other.call.is_like(x)]
            self._memory = _Memory(memory.state, (_Kept(top_k, call, decision), *others))
        y, fields = found
        return y, decision, _stats_of(fields)

    def _memory_of(self, layer: nn.Module) -> _Memory | None:
        """Of the layer as it is before it is asked for anything: another thread may change it meanwhile."""
        memory = self._memory
        if _state_of is None:
            return None
        return memory if calls.is_state_of(memory.state, layer, SETTINGS) else _Memory(_state_of(layer, SETTINGS))

    def run(
        self, x: torch.Tensor, routing: Routing, experts: Experts, capacity: Capacity, planner: Planner
    ) -> Brief | None:
        """The same after the gate."""
        if planner is not self._planner or not _is_brief(x, routing, capacity):
            return None
        decision = self._decisions.get(_key(x), {}).get(routing.expert_ids.shape[1])
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
            of_kind = self._decisions.setdefault(_key(x), {})
            of_kind[routing.expert_ids.shape[1]] = replace(decision, reason=reason)


def _stats_of(fields: Callable[[], tuple[torch.Tensor, ...]]) -> Callable[[], RoutingStats]:
    return lambda: RoutingStats(ops.GatedInference(*fields()).map)


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


def _key(x: torch.Tensor) -> _Key:
    return x.shape[:-1].numel(), x.dtype, torch.get_num_threads(), torch.is_grad_enabled()
