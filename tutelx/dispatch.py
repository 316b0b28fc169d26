"""The middle of a layer call: what to run, and where every slot's row goes.

On one process that needs nobody. Over many ranks they first agree (`tutelx.comm`), as all must run the same plan.
Shapes: T tokens, K choices a token, E experts, M model dim, W ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from tutelx import ops
from tutelx.errors import InvalidValueError
from tutelx.experts import Experts
from tutelx.gates import by_priority
from tutelx.stopwatch import Stopwatch, stopwatch
from tutelx.types import Capacity, Decision, DispatchMap, Layout, Plan, Planner, Routing, Workload

if TYPE_CHECKING:
    from tutelx.comm.agreement import Agreed
    from tutelx.comm.call import RankCall
    from tutelx.comm.ranks import Ranks


@dataclass(kw_only=True, slots=True)
class Dispatch:
    """map: this rank's slots. call: how their rows travel, None if they stay. agreed: what all ranks know.
    watch: of a call that is timed."""

    map: DispatchMap
    decision: Decision
    call: RankCall | None = None
    agreed: Agreed | None = None
    watch: Stopwatch | None = None


@dataclass(kw_only=True, slots=True)
class Request:
    """One call, as far as the gate brought it. x: [T, M]; capacity: the setting that holds for it."""

    x: torch.Tensor
    routing: Routing
    experts: Experts
    num_experts: int
    capacity: Capacity
    batch_prioritized: bool
    planner: Planner
    plan: Plan | None
    watch: Stopwatch | None = None

    @property
    def order(self) -> torch.Tensor | None:
        if not self.batch_prioritized:
            return None
        routing = self.routing
        return by_priority(routing.weights.amax(dim=1) if routing.priority is None else routing.priority)

    @property
    def layout(self) -> Layout:
        """The layout of the plan, or a guess at what will be planned."""
        return self.experts.layouts[0] if self.plan is None else self.plan.layout

    def limit(self, tokens: int) -> int | None:
        top_k = self.routing.top_k or self.routing.expert_ids.shape[1]
        return self.capacity.limit(tokens=tokens, top_k=top_k, num_experts=self.num_experts)

    def route(self, limit: int | None, layout: Layout, order: torch.Tensor | None) -> DispatchMap:
        return ops.route(self.routing.expert_ids, self.num_experts, limit, layout=layout, order=order)

    def workload(self, *, demand: int | None, limit: int | None) -> Workload:
        tokens, top_k = self.routing.expert_ids.shape
        return Workload(
            tokens=tokens,
            top_k=top_k,
            num_experts=self.num_experts,
            model_dim=self.x.shape[1],
            hidden_dim=self.experts.hidden_dim,
            demand=demand,
            capacity=limit,
            dtype=str(self.x.dtype).removeprefix("torch."),
            device=self.x.device.type,
            training=torch.is_grad_enabled(),
            threads=1 if torch.compiler.is_compiling() else torch.get_num_threads(),
            layouts=self.experts.layouts,
            expert_kernels=self.experts.kernels_for(self.x),
            expert_numbers=self.experts.numbers,
        )

    def decide(self, workload: Workload, planner: Planner | None = None) -> Decision:
        """planner: who plans for the ranks, if not the request's own."""
        if self.plan is not None:
            return Decision(plan=self.plan, source="call", reason="given with the call", workload=workload)
        decision = (planner or self.planner).plan(workload)
        self.watch = stopwatch(self.planner, decision, self.x.device)
        return decision

    def check(self, plan: Plan, workload: Workload) -> None:
        """Raises InvalidValueError if the plan is none of what the workload says can run."""
        for name, possible, whose in (
            ("layout", workload.layouts, "these experts run"),
            ("expert_kernel", workload.expert_kernels, "these experts run"),
            ("shard_degree", workload.shard_degrees, f"these experts run on {workload.world} ranks"),
            ("all_to_all", workload.all_to_alls, f"with ranks_per_node={workload.ranks_per_node} there is"),
        ):
            value = getattr(plan, name)
            if value not in possible:
                where = f" in {workload.dtype} on {workload.device}" if name == "expert_kernel" else ""
                raise InvalidValueError(f"plan.{name}={value!r}, but {whose} {possible}{where}")
        if not workload.load and plan.pipeline_degree > 1:
            raise InvalidValueError(f"plan.pipeline_degree={plan.pipeline_degree}, but the layer has no mesh")


def dispatch_here(request: Request) -> Dispatch:
    """Decides how to run, and routes. Routing comes first: the plan depends on what it finds."""
    limit = request.routing.capacity
    if limit is None:
        limit = request.limit(request.x.shape[0])
    order = request.order
    map = request.route(limit, request.layout, order)
    demand = None
    if request.plan is None and request.x.device.type == "cpu" and not torch.compiler.is_compiling():
        demand = max(map.counts.tolist())
    decision = request.decide(request.workload(demand=demand, limit=limit))
    request.check(decision.plan, decision.workload)
    if decision.plan.layout != map.layout:
        map = request.route(limit, decision.plan.layout, order)
    return Dispatch(map=map, decision=decision, watch=request.watch)


def dispatch_over_ranks(request: Request, ranks: Ranks) -> Dispatch:
    """Counts, agrees, decides, routes. The rows that a rank may send to an expert follow the most tokens of any rank.

    Raises:
        RankMismatchError, RankFailedError: on every rank that takes part.
    """
    routing, experts = request.routing, request.experts
    with ranks.announced_failure(request.x.device):
        order = request.order
        guess = (request.limit(request.x.shape[0]) if routing.capacity is None else routing.capacity, request.layout)
        map = request.route(*guess, order)
    agreed = ranks.agree(request, map.counts)

    limit = agreed.capacity
    if limit is None:
        limit = request.limit(agreed.tokens)
    workload = ranks.workload(request.workload(demand=agreed.demand, limit=limit), agreed, experts)
    decision = ranks.decide(request, agreed, workload)
    plan = decision.plan
    rows = limit
    if plan.layout == "padded":
        tight = limit is None or request.capacity.mode == "bounded"
        rows = max(1, min(agreed.demand, limit or agreed.demand)) if tight else limit
    if (rows, plan.layout) != guess:
        map = request.route(rows, plan.layout, order)
    call = ranks.call(plan, agreed, map, rows, request.x.shape[1])
    if map.capacity != limit:
        map = replace(map, capacity=limit)
    return Dispatch(map=map, decision=decision, call=call, agreed=agreed, watch=request.watch)
