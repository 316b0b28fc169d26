"""The MoE layer: gate -> plan -> route -> encode -> experts -> decode.

Shapes: T tokens, M model dim, E experts, K choices a token, R rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import nn

from tutelx import ops
from tutelx.errors import InvalidTypeError, InvalidValueError
from tutelx.experts import BatchedExperts, DroppingExperts, Experts, FeedForwardExperts, ListedExperts
from tutelx.gates import Gate, GateConfig, TopK, build_gate, by_priority
from tutelx.ops.activation import Activation
from tutelx.planner import RulePlanner
from tutelx.stats import RoutingStats
from tutelx.types import Capacity, Decision, DispatchMap, Plan, Planner, Routing, Workload


class _LastCall:
    """What the last call left to look at. A copy or a pickle of the layer starts without one."""

    def __init__(self) -> None:
        self.aux_loss: torch.Tensor | None = None
        self.decision: Decision | None = None
        self.stats: RoutingStats | None = None

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
    ) -> None:
        super().__init__()
        for name, setting in (("capacity", capacity), ("eval_capacity", eval_capacity or capacity)):
            if not isinstance(setting, Capacity):
                raise InvalidTypeError(f"{name} is {type(setting).__name__}, expected tutelx.Capacity")
        self.model_dim, self.num_experts = model_dim, num_experts
        self.capacity, self.eval_capacity = capacity, eval_capacity
        self.batch_prioritized = batch_prioritized
        self.planner: Planner = planner if planner is not None else RulePlanner()
        self._last = _LastCall()

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
        x_TM = self._check_input(x).reshape(-1, self.model_dim)
        if capacity is None:
            capacity = self.capacity if self.training or self.eval_capacity is None else self.eval_capacity
        routing = gate(x_TM, top_k, capacity=capacity, prioritized=self.batch_prioritized)
        if torch.is_autocast_enabled(x.device.type):
            x_TM = x_TM.to(torch.get_autocast_dtype(x.device.type))
        map, decision = self._dispatch(x_TM, routing, capacity, experts, plan)
        rows_RM = ops.encode(x_TM, map)
        rows_RM = experts(rows_RM, map, decision.plan)
        weights_TK = routing.weights if rows_RM.dtype != torch.float64 else routing.weights.to(rows_RM.dtype)
        y_TM = ops.decode(rows_RM, map, weights_TK)

        self._last.aux_loss = torch.stack(list(routing.aux_losses.values())).sum() if routing.aux_losses else None
        self._last.decision = decision
        self._last.stats = RoutingStats(map, routing)
        return y_TM.reshape(x.shape)

    def _dispatch(
        self, x_TM: torch.Tensor, routing: Routing, setting: Capacity, experts: Experts, plan: Plan | None
    ) -> tuple[DispatchMap, Decision]:
        """Decides how to run, and routes. Routing comes first: the plan depends on what it finds."""
        tokens, top_k = routing.expert_ids.shape
        limit = routing.capacity
        if limit is None:
            limit = setting.limit(tokens=tokens, top_k=routing.top_k or top_k, num_experts=self.num_experts)
        order = None
        if self.batch_prioritized:
            order = by_priority(routing.weights.amax(dim=1) if routing.priority is None else routing.priority)
        layout = experts.layouts[0] if plan is None else plan.layout
        map = ops.route(routing.expert_ids, self.num_experts, limit, layout=layout, order=order)
        demand = None
        if plan is None and x_TM.device.type == "cpu" and not torch.compiler.is_compiling():
            demand = int(map.counts.max())
        workload = Workload(
            tokens=tokens,
            top_k=top_k,
            num_experts=self.num_experts,
            model_dim=self.model_dim,
            hidden_dim=experts.hidden_dim,
            demand=demand,
            capacity=limit,
            dtype=str(x_TM.dtype).removeprefix("torch."),
            device=x_TM.device.type,
            training=torch.is_grad_enabled(),
            threads=torch.get_num_threads(),
            layouts=experts.layouts,
            expert_kernels=experts.kernels_for(x_TM),
        )
        if plan is not None:
            decision = Decision(plan=plan, source="call", reason="given with the call", workload=workload)
        else:
            decision = self.planner.plan(workload)
        _check_plan(decision.plan, workload)
        if decision.plan.layout != map.layout:
            map = ops.route(routing.expert_ids, self.num_experts, limit, layout=decision.plan.layout, order=order)
        return map, decision

    def _check_input(self, x: torch.Tensor) -> torch.Tensor:
        if not isinstance(x, torch.Tensor):
            raise InvalidTypeError(f"x is {type(x).__name__}, expected torch.Tensor")
        if x.dim() == 0 or x.shape[-1] != self.model_dim:
            raise InvalidValueError(f"x has shape {tuple(x.shape)}, expected [..., model_dim={self.model_dim}]")
        weights = next(self.parameters()).dtype
        if x.dtype != weights and not torch.is_autocast_enabled(x.device.type):
            raise InvalidTypeError(f"x is {x.dtype}, but the layer's weights are {weights}")
        return x


class MoE(MoEBase):
    """A Mixture-of-Experts layer: y = sum over a token's K experts of weight * expert(x).

    Args:
        model_dim: M, the size of a token.
        hidden_dim: H, the experts' hidden size (unused by custom experts).
        num_experts: E.
        gate: how tokens choose experts: a configuration of `tutelx.gates`, or a module that maps tokens [T, M] to
            logits [T, E] or to a Routing.
        capacity: how many rows an expert may receive; dropless by default.
        eval_capacity: the same in evaluation mode; None: as in training.
        batch_prioritized: where a capacity drops tokens, those with the greatest gate value keep their rows, not the
            first of the batch (V-MoE, section 4: all first choices, then all second ones, each by that order).
        experts: "gated" (SwiGLU: down(silu(gate(x)) * up(x))), "ffn" (down(gelu(up(x)))), an `nn.ModuleList` of E
            modules, each called with its rows [n, M], or a module called with padded rows [E, C, M].
        activation: of the built-in experts: silu, gelu, gelu_tanh or relu; default silu if gated, else gelu.
        bias: of the built-in experts.
        expert_dropout: of the built-in experts' hidden values in training, apart from any dropout around the layer.
        generator: draws that dropout; None takes torch's own. A gate that draws has a generator in its configuration.
        planner: chooses the plan of each call.

    Raises:
        InvalidValueError, InvalidTypeError: sizes below 1, k > num_experts, wrong number of expert modules.
    """

    def __init__(
        self,
        model_dim: int,
        hidden_dim: int,
        num_experts: int,
        *,
        gate: GateConfig | nn.Module | None = None,
        capacity: Capacity | None = None,
        eval_capacity: Capacity | None = None,
        batch_prioritized: bool = False,
        experts: Literal["gated", "ffn"] | nn.Module = "gated",
        activation: Activation | None = None,
        bias: bool = False,
        expert_dropout: float = 0.0,
        generator: torch.Generator | None = None,
        planner: Planner | None = None,
        device=None,
        dtype=None,
    ) -> None:
        for name, value in (("model_dim", model_dim), ("hidden_dim", hidden_dim), ("num_experts", num_experts)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise InvalidTypeError(f"{name}={value!r} is {type(value).__name__}, expected int")
            if value < 1:
                raise InvalidValueError(f"{name}={value} must be at least 1")
        capacity = Capacity.dropless() if capacity is None else capacity
        super().__init__(
            model_dim=model_dim,
            num_experts=num_experts,
            capacity=capacity,
            planner=planner,
            eval_capacity=eval_capacity,
            batch_prioritized=batch_prioritized,
        )
        self.gate = build_gate(TopK() if gate is None else gate, model_dim, num_experts, device=device, dtype=dtype)
        self.experts: Experts
        if expert_dropout and experts not in ("gated", "ffn"):
            raise InvalidValueError(f"expert_dropout={expert_dropout} is for built-in experts, not for modules")
        if isinstance(experts, nn.ModuleList):
            if len(experts) != num_experts:
                raise InvalidValueError(f"experts holds {len(experts)} modules, num_experts={num_experts}")
            self.experts = ListedExperts(experts)
        elif isinstance(experts, Experts):
            self.experts = experts
        elif isinstance(experts, nn.Module):
            self.experts = BatchedExperts(experts)
        elif experts in ("gated", "ffn"):
            gated = experts == "gated"
            build: Callable[..., Experts] = FeedForwardExperts
            if expert_dropout:
                build = partial(DroppingExperts, p=expert_dropout, generator=generator)
            self.experts = build(
                model_dim,
                hidden_dim,
                num_experts,
                gated=gated,
                activation=activation or ("silu" if gated else "gelu"),
                bias=bias,
                device=device,
                dtype=dtype,
            )
        else:
            raise InvalidValueError(f"experts={experts!r} is neither 'gated', 'ffn' nor a module")

    def forward(
        self,
        x: torch.Tensor,
        *,
        top_k: int | None = None,
        capacity: Capacity | None = None,
        plan: Plan | None = None,
    ) -> torch.Tensor:
        """x [..., M] -> [..., M] in x's dtype; top_k, capacity and plan hold for this call only.

        Raises:
            InvalidValueError: a wrong last dimension, top_k outside [1, E], a plan that the experts cannot run.
            InvalidTypeError: x is no tensor or has another dtype than the weights.
            ValueError: a NaN reached the gate.
        """
        return self._run(x, self.gate, self.experts, top_k=top_k, capacity=capacity, plan=plan)


def _check_plan(plan: Plan, workload: Workload) -> None:
    if plan.layout not in workload.layouts:
        raise InvalidValueError(f"plan.layout={plan.layout!r}, but these experts run {workload.layouts}")
    if plan.expert_kernel not in workload.expert_kernels:
        raise InvalidValueError(
            f"plan.expert_kernel={plan.expert_kernel!r}, but these experts run {workload.expert_kernels}"
            f" in {workload.dtype} on {workload.device}"
        )
