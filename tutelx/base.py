"""What every MoE layer does with a call: gate -> plan -> route -> encode -> experts -> decode.

Shapes: T tokens, M model dim, E experts, K choices a token, R rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import nn

from tutelx import ops
from tutelx.brief import Brief, BriefCalls
from tutelx.choices import Choosing
from tutelx.dispatch import Dispatch, Request, dispatch_here, dispatch_over_ranks
from tutelx.errors import InvalidTypeError, InvalidValueError
from tutelx.experts import Experts
from tutelx.gates import Gate
from tutelx.policies import Policies
from tutelx.scheduler import default_planner
from tutelx.stats import RoutingStats
from tutelx.stopwatch import Stopwatch, named
from tutelx.types import Capacity, Decision, Plan, Planner

if TYPE_CHECKING:
    from tutelx.comm.ranks import Ranks
    from tutelx.comm.tensor_parallel import TensorParallel


class _LastCall:
    """What the last call left to look at. A copy or a pickle of the layer starts without one."""

    def __init__(self) -> None:
        self.aux_loss: torch.Tensor | None = None
        self.decision: Decision | None = None
        self._stats: RoutingStats | Callable[[], RoutingStats] | None = None
        self.watch: Stopwatch | None = None

    @property
    def stats(self) -> RoutingStats | None:
        if callable(self._stats):
            self._stats = self._stats()
        return self._stats

    def let_go(self) -> None:
        """Of arrays that nobody looked at: the next call takes their memory again while it is in the cache."""
        if callable(self._stats):
            self._stats = None

    def end(
        self,
        decision: Decision,
        stats: RoutingStats | Callable[[], RoutingStats],
        aux_losses: Mapping[str, torch.Tensor],
    ) -> None:
        """stats: or what makes them, for a call that takes no longer than that."""
        self.aux_loss = torch.stack(list(aux_losses.values())).sum() if aux_losses else None
        self.decision, self._stats = decision, stats

    def __deepcopy__(self, memo: dict) -> _LastCall:
        return _LastCall()

    def __reduce__(self) -> tuple:
        return _LastCall, ()


class MoEBase(nn.Module):
    """Runs one layer call for whoever holds a gate and experts: :class:`MoE` and the wrapped layers."""

    def __init__(
        self,
        *,
        model_dim: int,
        num_experts: int,
        capacity: Capacity,
        planner: Planner | None,
        eval_capacity: Capacity | None = None,
        batch_prioritized: bool = False,
        top_k: int | None = None,
        policies: Policies | None = None,
    ) -> None:
        super().__init__()
        for name, setting in (("capacity", capacity), ("eval_capacity", eval_capacity or capacity)):
            if not isinstance(setting, Capacity):
                raise InvalidTypeError(f"{name} is {type(setting).__name__}, expected tutelx.Capacity")
        self.model_dim, self.num_experts = model_dim, num_experts
        self.capacity, self.eval_capacity = capacity, eval_capacity
        self.batch_prioritized = batch_prioritized
        self.top_k, self.policies = top_k, policies
        self.planner: Planner = planner if planner is not None else default_planner()
        self.ranks: Ranks | None = None
        self.tensor_parallel: TensorParallel | None = None
        self._last = _LastCall()
        self._choosing, self._brief = Choosing(), BriefCalls()

    @property
    def aux_loss(self) -> torch.Tensor:
        """The last call's auxiliary losses, multiplied by their coefficients and summed; 0 without gradients."""
        return torch.zeros(()) if self._last.aux_loss is None else self._last.aux_loss

    @property
    def last_decision(self) -> Decision | None:
        """The last call's plan, where it came from and why."""
        return self._last.decision

    @property
    def stats(self) -> RoutingStats | None:
        """The last call's load: tokens per expert, dropped slots, needed capacity factor."""
        return self._last.stats

    def _run(
        self,
        x: torch.Tensor,
        gate: Gate,
        experts: Experts,
        *,
        top_k: int | None = None,
        capacity: Capacity | None = None,
        plan: Plan | None = None,
    ) -> torch.Tensor:
        own = self._own_capacity
        if capacity is None and plan is None and self._may_be_brief() and self._is_input(x):
            whole_call = self._brief.gate_and_run(x, gate, experts, self, top_k, own, self.planner)
            if whole_call is not None:
                return self._end_brief(whole_call)
        with self._prepared():
            x = self._check_input(x)
            tokens_TM = x_TM = _flat(x)
            chosen = self._choosing.choose(
                x_TM,
                top_k=top_k,
                capacity=capacity,
                plan=plan,
                setting=(self.top_k, own),
                policies=self.policies,
                planner=self.planner if self.ranks is None else self.ranks.joined(self.planner),
                num_experts=self.num_experts,
                last=self._last.decision,
            )
            capacity = chosen.capacity
            routing = whole = gate(x_TM, chosen.top_k, capacity=capacity, prioritized=self.batch_prioritized)
            may_be_brief = self._may_be_brief() and chosen.plan is None
            if may_be_brief:
                brief = self._brief.run(x_TM, routing, experts, capacity, self.planner)
                if brief is not None:
                    y_TM, decision, make_stats = brief
                    self._last.end(decision, make_stats, routing.aux_losses)
                    return _shaped(y_TM, x)
            if torch.is_autocast_enabled(x.device.type):
                x_TM = x_TM.to(torch.get_autocast_dtype(x.device.type))
            if self.tensor_parallel is not None:
                x_TM, routing = self.tensor_parallel.share(x_TM, routing)
        request = Request(
            x=x_TM,
            routing=routing,
            experts=experts,
            num_experts=self.num_experts,
            capacity=capacity,
            batch_prioritized=self.batch_prioritized,
            planner=self.planner,
            plan=chosen.plan,
        )
        step = dispatch_here(request) if self.ranks is None else dispatch_over_ranks(request, self.ranks)
        with named(step.decision.plan):
            if step.watch is None:
                y_TM = self._compute(x_TM, routing.weights, experts, step)
            else:
                y_TM = self._compute(step.watch.begin(x_TM), routing.weights, experts, step)
                step.watch.end(y_TM)
                self._last.watch = step.watch
        if self.tensor_parallel is not None:
            y_TM = self.tensor_parallel.gather(y_TM, whole.expert_ids.shape[0])

        stats = RoutingStats(step.map, routing, agreed=step.agreed, call=step.call)
        self._last.end(step.decision if chosen.decision is None else chosen.decision, stats, whole.aux_losses)
        self._choosing.keep(
            tokens_TM,
            chosen,
            step.decision,
            policies=self.policies,
            planner=self.planner,
            stats=stats,
            plans=self.ranks is None,
        )
        if may_be_brief:
            self._brief.keep(x_TM, routing, capacity, self.planner, step.decision)
        return _shaped(y_TM, x)

    def _again(self, x: torch.Tensor, top_k: int | None) -> torch.Tensor | None:
        """What `_run` gives with the layer's own modules, if it ran such a call before; sooner."""
        if torch.compiler.is_compiling():
            return None
        self._last.let_go()
        brief = self._brief.again(self, x, top_k)
        return None if brief is None else self._end_brief(brief)

    def _end_brief(self, brief: Brief) -> torch.Tensor:
        y, decision, make_stats = brief
        self._last.end(decision, make_stats, {})
        return y

    def _compute(self, x_TM: torch.Tensor, weights_TK: torch.Tensor, experts: Experts, step: Dispatch) -> torch.Tensor:
        """The tokens to their experts and back, as it was decided."""
        call, map, plan = step.call, step.map, step.decision.plan
        if call is None:
            rows_RM = experts(ops.encode(x_TM, map), map, plan)
        else:
            map, weights_TK = call.map, call.spread(weights_TK)
            rows_RM = experts.across(ops.encode(x_TM, map), call, plan)
        return ops.decode(rows_RM, map, weights_TK if rows_RM.dtype != torch.float64 else weights_TK.to(rows_RM.dtype))

    @property
    def _own_capacity(self) -> Capacity:
        return self.capacity if self.training or self.eval_capacity is None else self.eval_capacity

    def _load_from_state_dict(self, *args, **named) -> None:
        self._brief.forget()  # else weights that others take the place of would stay until the next call
        super()._load_from_state_dict(*args, **named)

    def _may_be_brief(self) -> bool:
        return self.ranks is None and self.policies is None and not self.batch_prioritized

    def _prepared(self) -> AbstractContextManager[None]:
        """Whatever fails in here is told to the other ranks, which would wait."""
        return nullcontext() if self.ranks is None else self.ranks.announced_failure(next(self.parameters()).device)

    def _is_input(self, x: object) -> bool:
        return isinstance(x, torch.Tensor) and x.dim() > 0 and x.shape[-1] == self.model_dim

    def _check_input(self, x: torch.Tensor) -> torch.Tensor:
        if not isinstance(x, torch.Tensor):
            raise InvalidTypeError(f"x is {type(x).__name__}, expected torch.Tensor")
        if not self._is_input(x):
            raise InvalidValueError(f"x has shape {tuple(x.shape)}, expected [..., model_dim={self.model_dim}]")
        weight = _first_parameter(self)
        if weight is not None and x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise InvalidTypeError(f"x is {x.dtype}, but the layer's weights are {weight.dtype}")
        return x


def _flat(x: torch.Tensor) -> torch.Tensor:
    """[..., M] -> [T, M]."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _shaped(y_TM: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[T, M] -> [..., M] for `like` [..., M]."""
    return y_TM if like.dim() == 2 else y_TM.reshape(*like.shape[:-1], y_TM.shape[1])


def _first_parameter(module: nn.Module) -> nn.Parameter | None:
    """What `next(module.parameters())` gives, sooner: that takes longer than a small operator."""
    for parameter in module._parameters.values():
        if parameter is not None:
            return parameter
    for child in module._modules.values():
        if child is not None and (parameter := _first_parameter(child)) is not None:
            return parameter
    return None
