"""Experts of transformers shared among ranks: each holds some of them whole, and tokens travel.

The library's own expert parallelism wants the same batch on every rank; here each rank has its own.
Shapes: T tokens, K choices a token, E experts of all ranks, M model dim, R rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tutelx import ops
from tutelx.comm import join
from tutelx.dispatch import Request, dispatch_over_ranks
from tutelx.errors import InvalidValueError
from tutelx.integrations.transformers.setting import Setting, setting_of
from tutelx.stats import RoutingStats
from tutelx.stopwatch import named
from tutelx.types import DispatchMap, ExpertKernel, Layout, Plan, Routing

if TYPE_CHECKING:
    from tutelx.comm.mesh import MeshLike
    from tutelx.comm.placement import Placement

Compute = Callable[[torch.Tensor, DispatchMap, Plan], torch.Tensor]


class LocalExperts:
    """What an agreement and a planner ask of this rank's experts."""

    layouts: tuple[Layout, ...] = ("ragged",)
    expert_kernels: tuple[ExpertKernel, ...] = ("tiled",)
    numbers = 0  # the weights never travel

    def __init__(self, module: nn.Module, hidden_dim: int) -> None:
        self._module, self.hidden_dim = module, hidden_dim

    def parameters(self) -> Iterator[nn.Parameter]:
        return self._module.parameters()

    def kernels_for(self, x: torch.Tensor) -> tuple[ExpertKernel, ...]:
        return self.expert_kernels

    def shard_degrees(self, placement: Placement) -> tuple[int, ...]:
        return (1,)

    def describe(self) -> str:
        return type(self._module).__name__[:24]


def check_shareable(experts: nn.Module) -> None:
    """Raises InvalidValueError for a parameter that does not belong to one expert each."""
    for name, parameter in experts.named_parameters():
        if "." in name or parameter.shape[:1] != (experts.num_experts,):
            shape = tuple(parameter.shape)
            raise InvalidValueError(f"mesh was given, but {name} of shape {shape} belongs to all experts together")


def share(experts: nn.Module, setting: Setting, mesh: MeshLike) -> None:
    """Keeps this rank's experts of parameters that hold all of them, and lets the others go. All ranks must call.

    The parameters stay the same objects. `state_dict` gives them as DTensors of the whole shape, and `load_state_dict`
    takes whole tensors.

    Raises:
        InvalidValueError: as :func:`check_shareable`, or a mesh that cannot be used.
    """
    check_shareable(experts)
    E = int(experts.num_experts)  # type: ignore[arg-type]
    own = dict(experts.named_parameters())
    setting.ranks, _ = join(mesh, num_experts=E, hidden_dim=None, ranks_per_node=None, tp_group=None)
    assert setting.ranks is not None
    shards = {name: setting.ranks.shard(tuple(p.shape), None) for name, p in own.items()}  # type: ignore[arg-type]
    for name, parameter in own.items():
        parameter.data = parameter.data[shards[name].index].clone()
        parameter.grad = None
    setting.ranks.hold(experts, shards)


def gather(experts: nn.Module, setting: Setting) -> None:
    """Gives the parameters all experts back. All ranks must call."""
    shards = experts._expert_shards
    for name, shard in shards.items():  # type: ignore[union-attr, operator]
        parameter = experts.get_parameter(name)
        parameter.data = _full(shard.whole(parameter.data))
        parameter.grad = None
    experts._expert_shards = {}  # type: ignore[assignment]
    setting.ranks = None


def forward_across(
    experts: Any,
    x_TM: torch.Tensor,
    ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    *,
    hidden_dim: int,
    setting: Setting,
    compute: Compute,
) -> torch.Tensor:
    """x [T, M] of this rank through the experts of all: [T, M]. compute: rows, map of this rank's experts, plan.

    The gradients of the experts are those of the sum of the losses of all ranks.

    Raises:
        RankMismatchError, RankFailedError: on every rank that takes part.
    """
    from tutelx.comm.pipeline import run_modules

    assert setting.ranks is not None
    local = LocalExperts(experts, hidden_dim)
    request = Request(
        x=x_TM,
        routing=Routing(expert_ids=ids_TK.int(), weights=weights_TK),
        experts=local,  # type: ignore[arg-type]
        num_experts=experts.num_experts,
        capacity=setting.capacity,
        batch_prioritized=False,
        planner=setting.planner,
        plan=None,
    )
    step = dispatch_over_ranks(request, setting.ranks)
    call, plan = step.call, step.decision.plan
    assert call is not None
    parameters = [p for p in experts.parameters() if p.requires_grad]
    with named(plan):
        rows_RM = ops.encode(x_TM if step.watch is None else step.watch.begin(x_TM), call.map)
        rows_RM = run_modules(call, rows_RM, lambda arrived, map: compute(arrived, map, plan), parameters, plan)
        y_TM = ops.decode(rows_RM, call.map, call.spread(weights_TK))
        if step.watch is not None:
            step.watch.end(y_TM)
            setting.watch = step.watch
    setting.last_decision = step.decision
    setting.stats = RoutingStats(step.map, request.routing, agreed=step.agreed, call=call)
    return y_TM


def whole_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """`model.state_dict()` with all experts in it, on the CPU, for `model.save_pretrained(folder, state_dict=...)`.

    All ranks must call; one of them saves.
    """
    return {name: _full(value).cpu() for name, value in model.state_dict().items()}


def is_shared(experts: nn.Module) -> bool:
    setting = setting_of(experts)
    return setting is not None and setting.ranks is not None


def _full(value: torch.Tensor) -> torch.Tensor:
    from torch.distributed.tensor import DTensor

    return value.full_tensor() if isinstance(value, DTensor) else value
