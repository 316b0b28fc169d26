"""Which parameters are this rank's own, and among which ranks their gradients must be added up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import nn

from tutelx.comm.shards import Shard, shards_of
from tutelx.errors import InvalidTypeError, InvalidValueError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    GroupLike = DeviceMesh | dist.ProcessGroup


def expert_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of experts that this rank alone holds, or with its replicas; empty for layers without a mesh."""
    return [parameter for _, parameter, _ in own_parameters(model)]


def replicated_parameters(model: nn.Module) -> list[nn.Parameter]:
    """All other parameters: gates, shared experts, and whatever the model has besides."""
    own = {id(parameter) for parameter in expert_parameters(model)}
    return [parameter for parameter in model.parameters() if id(parameter) not in own]


def own_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter, Shard]]:
    """Name, parameter and shard of :func:`expert_parameters`."""
    if not isinstance(model, nn.Module):
        raise InvalidTypeError(f"model is {type(model).__name__}, expected torch.nn.Module")
    shards = shards_of(model)
    return [(name, parameter, shards[name]) for name, parameter in model.named_parameters() if name in shards]


@dataclass(frozen=True)
class Replication:
    """The ranks whose losses are averaged, and those among them that hold the same experts as this one.

    group: W ranks. replicas: None where each expert is held once.
    """

    group: dist.ProcessGroup
    replicas: dist.ProcessGroup | None

    @classmethod
    def of(cls, model: nn.Module, group: GroupLike | None, replicas: GroupLike | None) -> Replication:
        """Raises InvalidValueError where the two do not fit how the model's experts are spread."""
        found = cls(_process_group(group, "group"), None if replicas is None else _process_group(replicas, "replicas"))
        for name, _, shard in own_parameters(model):
            found._check(name, shard)
        return found

    @property
    def world(self) -> int:
        return self.group.size()

    def of_shard(self, shard: Shard) -> dist.ProcessGroup | None:
        """The ranks that hold copies of this shard; None where there is one."""
        return None if shard.mesh.world == self.world else self.replicas

    def _check(self, name: str, shard: Shard) -> None:
        ranks, holders = _ranks(self.group), set(shard.mesh.global_ranks)
        if not holders <= set(ranks):
            raise InvalidValueError(f"{name} lies on the ranks {sorted(holders)}, but the group has the ranks {ranks}")
        if len(holders) == len(ranks):
            return
        if self.replicas is None:
            raise InvalidValueError(
                f"{name} lies on {len(holders)} ranks, but the group has {len(ranks)}: give replicas, the group of the"
                " ranks that hold the same experts"
            )
        copies = _ranks(self.replicas)
        shared = sorted(holders & set(copies))
        if len(copies) * len(holders) != len(ranks) or not set(copies) <= set(ranks) or shared != [dist.get_rank()]:
            raise InvalidValueError(
                f"{name} lies on the ranks {sorted(holders)} and replicas are the ranks {copies}, which together do not"
                f" make up the group's {ranks}"
            )


def _process_group(group: GroupLike | None, name: str) -> dist.ProcessGroup:
    from torch.distributed.device_mesh import DeviceMesh

    if group is None:
        if not dist.is_initialized():
            raise InvalidValueError("torch.distributed is not initialised: call init_process_group first")
        return dist.group.WORLD  # type: ignore[return-value]
    found: Any = group
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise InvalidValueError(f"{name} has shape {tuple(group.shape)}, expected one dimension")
        found = group.get_group()
    if not isinstance(found, dist.ProcessGroup):
        raise InvalidTypeError(f"{name} is {type(group).__name__}, expected DeviceMesh, ProcessGroup or None")
    if dist.get_rank(found) < 0:
        raise InvalidValueError(f"rank {dist.get_rank()} is not in {name}, which has the ranks {_ranks(found)}")
    return found


def _ranks(group: dist.ProcessGroup) -> list[int]:
    return dist.get_process_group_ranks(group)
