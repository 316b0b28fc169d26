"""What a layer knows of the other ranks: who owns what, and how a call is agreed on, decided and run."""

from __future__ import annotations

from collections import OrderedDict
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import nn

from tutelx.comm.agreement import Agreed, Terms, agree, agree_on_plan, announced_failure
from tutelx.comm.call import RankCall
from tutelx.comm.meeting import joined, meet, standing
from tutelx.comm.mesh import Mesh
from tutelx.comm.placement import Placement
from tutelx.comm.shards import Shard, hold_own, hold_shards
from tutelx.types import AllToAll, Capacity, Decision, DispatchMap, Plan, Planner, Routing, Workload

_REMEMBERED = 256  # calls whose backward may be outstanding


class Request(Protocol):
    """What is asked of a call: see `tutelx.dispatch`."""

    @property
    def x(self) -> torch.Tensor: ...
    @property
    def routing(self) -> Routing: ...
    @property
    def experts(self) -> Any: ...
    @property
    def num_experts(self) -> int: ...
    @property
    def capacity(self) -> Capacity: ...
    @property
    def planner(self) -> Planner: ...
    @property
    def plan(self) -> Plan | None: ...

    def decide(self, workload: Workload, planner: Planner | None = None) -> Decision: ...

    def check(self, plan: Plan, workload: Workload) -> None: ...


class Ranks:
    """The ranks that share a layer's experts."""

    def __init__(self, mesh: Mesh, placement: Placement) -> None:
        self.mesh, self.placement = mesh, placement
        self._decisions: OrderedDict[tuple, Decision] = OrderedDict()

    def __deepcopy__(self, memo: dict) -> Ranks:
        return Ranks(self.mesh, self.placement)

    def shard(self, shape: tuple[int, ...], sliced_dim: int) -> Shard:
        """This rank's part of a parameter whose whole shape is [E, ...]."""
        return Shard(mesh=self.mesh, placement=self.placement, shape=shape, sliced_dim=sliced_dim)

    def hold_modules(self, module: nn.Module) -> None:
        """Declares all parameters of `module`, which is somebody's experts, to be this rank's own."""
        hold_own(module, self.mesh, self.placement)

    def hold(self, module: nn.Module, shards: dict[str, Shard]) -> None:
        """Declares them: state dicts carry the whole tensors, gradient averaging leaves them out."""
        hold_shards(module, shards)

    def announced_failure(self, device: torch.device) -> AbstractContextManager[None]:
        """What fails in here before the ranks agree is told to the others."""
        return announced_failure(self.mesh, device)

    def agree(self, request: Request, counts: torch.Tensor) -> Agreed:
        """counts: [E] of this rank, before any drop."""
        routing, experts, x = request.routing, request.experts, request.x
        terms = Terms(
            call="layer",
            num_experts=request.num_experts,
            model_dim=x.shape[1],
            hidden_dim=experts.hidden_dim,
            experts=experts.describe(),
            dtype=str(x.dtype).removeprefix("torch."),
            device=x.device.type,
            top_k=routing.top_k or routing.expert_ids.shape[1],
            capacity=request.capacity.mode,
            capacity_factor=request.capacity.factor,
            grad=torch.is_grad_enabled(),
            ranks_per_node=self.mesh.ranks_per_node,
            planner="" if request.plan is not None else standing(request.planner, self.mesh),
            plan=request.plan or getattr(request.planner, "always", None),
        )
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in experts.parameters())
        return agree(
            self.mesh,
            terms,
            counts,
            tokens=x.shape[0],
            capacity=routing.capacity,
            threads=torch.get_num_threads(),
            grad=trains or (torch.is_grad_enabled() and x.requires_grad),
            train_experts=trains,
        )

    def workload(self, local: Workload, agreed: Agreed, experts: Any) -> Workload:
        """The same on every rank: the most tokens, the greatest demand and the fewest threads of any rank."""
        all_to_alls: tuple[AllToAll, ...] = ("linear",) if self.mesh.ranks_per_node is None else ("linear", "2dh")
        return replace(
            local,
            tokens=agreed.tokens,
            threads=agreed.threads,
            expert_kernels=tuple(kernel for kernel in local.expert_kernels if kernel != "grouped"),
            shard_degrees=experts.shard_degrees(self.placement),
            all_to_alls=all_to_alls,
            world=self.mesh.world,
            ranks_per_node=self.mesh.ranks_per_node,
            expert_numbers=experts.numbers,
            load=tuple(agreed.counts.sum(dim=0).tolist()),
        )

    def decide(self, request: Request, agreed: Agreed, workload: Workload) -> Decision:
        """The decision of all ranks.

        Activation checkpointing runs the forward again in the backward pass: the kept tensors and the bits must then be
        those of the first time, whatever the planner has learnt since.

        Raises:
            RankMismatchError: on every rank, if the planners differ.
        """
        key = hash(agreed.counts.numpy().tobytes()), agreed.tokens, workload.top_k, workload.capacity, workload.dtype
        first = self._decisions.get(key) if torch._C._current_graph_task_id() != -1 else None
        if first is not None:
            return first
        decision = self._planned(request, workload) if request.plan is None else request.decide(workload)
        request.check(decision.plan, workload)
        decision = replace(decision, exchange=self._describe(decision.plan))
        self._decisions[key] = decision
        self._decisions.move_to_end(key)
        if len(self._decisions) > _REMEMBERED:
            self._decisions.popitem(last=False)
        return decision

    def joined(self, planner: Planner) -> Planner:
        """Who plans for these ranks, once they have met."""
        return joined(planner, self.mesh)

    def _planned(self, request: Request, workload: Workload) -> Decision:
        device = request.x.device
        planner = meet(request.planner, self.mesh, device)
        if planner is request.planner and getattr(planner, "same_on_all_ranks", False):
            return request.decide(workload)
        with self.announced_failure(device):
            decision = request.decide(workload, planner)
        if not getattr(planner, "same_on_all_ranks", False):
            agree_on_plan(self.mesh, decision.plan, device)
        return decision

    def call(self, plan: Plan, agreed: Agreed, map: DispatchMap, limit: int | None, model_dim: int) -> RankCall:
        """How the rows of `map` travel. limit: rows that a rank may send to one expert; padded, does."""
        kept = agreed.counts
        if map.layout == "padded":
            assert limit is not None
            kept = torch.full_like(kept, limit)
        elif limit is not None:
            kept = kept.clamp_max(limit)
        return RankCall(
            self.mesh,
            self.placement,
            plan,
            kept,
            map,
            model_dim,
            grad=agreed.grad,
            train_experts=agreed.train_experts,
            number=agreed.number,
        )

    def _describe(self, plan: Plan) -> str:
        """What really runs between the ranks, in words."""
        world = self.mesh.world
        if plan.shard_degree == 0:
            return f"weights gathered from {world} ranks, rows stay"
        if plan.all_to_all == "linear":
            return f"linear over {world} ranks"
        m = self.mesh.check_nodes()
        return f"2dh over {world // m} nodes of {m} ranks ({self.mesh.origin})"
