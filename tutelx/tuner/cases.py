"""A real layer and inputs with exactly the load that a workload tells of.

T tokens of this rank, K choices, E experts, M model dim.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import nn

from tutelx.layer import MoE
from tutelx.planner import RulePlanner
from tutelx.tuner.grid import fullest
from tutelx.tuner.shapes import Shape
from tutelx.types import Decision, Plan, Routing, Workload


class Router(nn.Module):
    """A gate whose choices were made before: ids [T, K] int32 and weights [T, K], float32 or wider, with gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.routing: Routing | None = None

    def forward(self, x_TM: torch.Tensor) -> Routing:
        assert self.routing is not None
        return self.routing


class RulesHeard:
    """The rules, as a planner that keeps the workload it was last told."""

    same_on_all_ranks = True

    def __init__(self) -> None:
        self._rules = RulePlanner()
        self.heard: Workload | None = None

    def plan(self, workload: Workload) -> Decision:
        self.heard = workload
        return self._rules.plan(workload)


@dataclass(kw_only=True)
class Subject:
    """The layer of one shape, for all its workloads.

    group: the ranks that share its experts, None for this process alone.
    """

    shape: Shape
    group: dist.ProcessGroup | None
    ranks_per_node: int | None
    device: torch.device
    seed: int
    layer: MoE = field(init=False)
    router: Router = field(init=False)
    planner: RulesHeard = field(init=False)

    def __post_init__(self) -> None:
        self.router, self.planner = Router(), RulesHeard()
        self.layer = self.build(self.group, self.router, self.planner)

    def build(self, group: dist.ProcessGroup | None, router: nn.Module, planner: RulesHeard | None = None) -> MoE:
        """Weights depend on the seed alone: what ranks hold together, one process holds whole."""
        shape, devices = self.shape, [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(self.seed)
            return MoE(
                shape.model_dim,
                shape.hidden_dim,
                shape.num_experts,
                gate=router,
                experts=shape.experts,
                bias=shape.bias,
                planner=planner,
                mesh=group,
                ranks_per_node=self.ranks_per_node if group is not None else None,
                device=self.device,
                dtype=getattr(torch, shape.dtype),
            )

    @property
    def rank(self) -> int:
        return 0 if self.group is None else dist.get_rank(self.group)

    def case(self, workload: Workload) -> Case:
        return Case(subject=self, workload=workload, inputs=Inputs.of(workload, self.rank, self.seed, self.device))


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """x, grad_y [T, M]; ids [T, K] int32; weights [T, K]. Those of another rank can be made anywhere."""

    x_TM: torch.Tensor
    grad_TM: torch.Tensor
    ids_TK: torch.Tensor
    weights_TK: torch.Tensor

    @classmethod
    def of(cls, workload: Workload, rank: int, seed: int, device: torch.device) -> Inputs:
        with torch.device("cpu"):
            generator = torch.Generator().manual_seed(seed * 2**20 + rank)
            sizes = workload.tokens, workload.model_dim
            x, grad = (torch.randn(sizes, generator=generator) for _ in range(2))
            ids = loaded_ids(workload.tokens, workload.top_k, workload.num_experts, fullest(workload), generator)
            weights = torch.rand(ids.shape, generator=generator) + 0.5
            weights = weights / weights.sum(dim=1, keepdim=True)
        dtype = getattr(torch, workload.dtype)
        return cls(
            x_TM=x.to(device, dtype),
            grad_TM=grad.to(device, dtype),
            ids_TK=ids.to(device),
            weights_TK=weights.to(device, torch.promote_types(dtype, torch.float32)),
        )


@dataclass(kw_only=True)
class Case:
    """One workload, ready to be run under any plan."""

    subject: Subject
    workload: Workload
    inputs: Inputs
    _leaves: dict[str, torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        training, given = self.workload.training, self.inputs
        self._leaves = {
            "x": given.x_TM.requires_grad_(training),
            "routing weights": given.weights_TK.requires_grad_(training),
            **dict(self.subject.layer.named_parameters()),
        }
        self.subject.layer.train(training)

    def ready(self) -> None:
        """Before each call, outside of its time: no gradient is left from the one before."""
        self.subject.router.routing = Routing(expert_ids=self.inputs.ids_TK, weights=self.inputs.weights_TK)
        for leaf in self._leaves.values():
            leaf.grad = None

    def call(self, plan: Plan | None = None) -> torch.Tensor:
        """What is timed: y [T, M], with gradients left behind in training."""
        with torch.set_grad_enabled(self.workload.training):
            y_TM = self.subject.layer(self.inputs.x_TM, plan=plan)
            if self.workload.training:
                y_TM.backward(self.inputs.grad_TM)
        return y_TM.detach()

    def results(self, plan: Plan) -> dict[str, torch.Tensor]:
        """The output and, in training, all gradients by name. Those of the next call are other tensors."""
        self.ready()
        y_TM = self.call(plan)
        return {"y": y_TM, **self.gradients()}

    def gradients(self) -> dict[str, torch.Tensor]:
        if not self.workload.training:
            return {}
        return {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in self._leaves.items()}

    def hear(self) -> tuple[Workload, Plan]:
        """The workload as the layer's planner is told it, and the rules' plan for it. Over ranks all must call."""
        self.ready()
        self.call()
        decision = self.subject.layer.last_decision
        heard = self.subject.planner.heard
        assert decision is not None
        assert heard is not None
        return heard, decision.plan


def loaded_ids(
    tokens: int, top_k: int, num_experts: int, fullest: int, generator: torch.Generator | None = None
) -> torch.Tensor:
    """[T, K] int32 on the CPU, distinct within a token: expert 0 gets exactly `fullest` slots, the others share the
    rest as evenly as can be. Tokens come in random order.

    fullest: at least ceil(K*T/E), or another expert would be the fullest; at most T.
    """
    with torch.device("cpu"):
        if top_k == num_experts:
            order = torch.rand((tokens, num_experts), generator=generator).argsort(dim=1)
            return order.int()
        first = torch.zeros(tokens, dtype=torch.bool)
        first[:fullest] = True
        free = top_k - first.long()
        # Dealt in turn, so that the choices of one token, at most E - 1 in a row, differ.
        begin = free.cumsum(0) - free
        choice = begin.unsqueeze(1) + torch.arange(top_k) - first.long().unsqueeze(1)
        names = 1 + torch.randperm(num_experts - 1, generator=generator)
        ids = names[choice.remainder(num_experts - 1)]
        ids[first, 0] = 0
        return ids[torch.randperm(tokens, generator=generator)].int()


def same_terms(told: Workload, heard: Workload) -> bool:
    """Whether a layer heard what it was meant to: `load` is known only to layers."""
    return replace(heard, load=()) == replace(told, load=())
