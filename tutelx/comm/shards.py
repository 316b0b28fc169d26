"""Shards: the part of an expert tensor that this rank holds, and state dicts that carry the whole tensor's shape.

Symbols: E experts, W ranks, s ranks an expert (slices).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tutelx.comm.mesh import Mesh
from tutelx.comm.placement import Placement, chunk
from tutelx.comm.subgroups import subgroup
from tutelx.errors import InvalidTypeError, InvalidValueError


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One parameter among the ranks of `mesh`.

    shape: of the whole tensor, [E, ...].
    sliced_dim: the dimension that is cut, as `torch.chunk` cuts, where an expert has s > 1 ranks.

    Raises:
        InvalidValueError: experts are sliced, and `sliced_dim` is None.
    """

    mesh: Mesh
    placement: Placement
    shape: tuple[int, ...]
    sliced_dim: int | None = None

    def __post_init__(self) -> None:
        if self.sliced_dim is None and self.placement.slices > 1:
            raise InvalidValueError(f"sliced_dim=None, but each expert has {self.placement.slices} ranks")

    @property
    def index(self) -> tuple[slice, ...]:
        """Where the part lies in the whole tensor."""
        own = self.placement.experts_of(self.mesh.rank)
        index = [slice(0, size) for size in self.shape]
        index[0] = slice(own.start, own.stop)
        slices = self.placement.slices
        if self.sliced_dim is not None and slices > 1:
            part = chunk(self.shape[self.sliced_dim], slices, self.mesh.rank % slices)
            index[self.sliced_dim] = slice(part.start, part.stop)
        return tuple(index)

    @property
    def local_shape(self) -> tuple[int, ...]:
        return tuple(part.stop - part.start for part in self.index)

    def whole(self, local: torch.Tensor) -> torch.Tensor:
        """The tensor that all ranks hold together, as a DTensor over this rank's part; on one rank the part itself.

        Shares memory with `local`.
        """
        if self.mesh.world == 1:
            return local
        from torch.distributed.tensor import DTensor

        like = torch.empty(self.shape, device="meta")
        return DTensor.from_local(
            local,
            self._device_mesh(local.device.type),
            self._placements(),
            run_check=False,
            shape=like.shape,
            stride=like.stride(),
        )

    def part(self, value: torch.Tensor) -> torch.Tensor:
        """This rank's part of a whole tensor, plain or a DTensor of any mesh that this rank is in.

        A DTensor that is distributed in another way is gathered first, for which all ranks of its mesh must call.

        Raises:
            InvalidValueError: `value` has not the whole tensor's shape.
        """
        if tuple(value.shape) != self.shape:
            raise InvalidValueError(
                f"a tensor of shape {tuple(value.shape)} was given, expected that of all experts, {self.shape}"
            )
        from torch.distributed.tensor import DTensor

        if isinstance(value, DTensor):
            if self.mesh.world > 1:
                same = value.device_mesh == self._device_mesh(value.device_mesh.device_type)
                if same and tuple(value.placements) == self._placements():
                    return value.to_local()
            value = value.full_tensor()
        return value[self.index]

    def _placements(self) -> tuple[Any, ...]:
        from torch.distributed import tensor

        if self.placement.slices == 1 or self.sliced_dim is None:
            return (tensor.Shard(0),)
        return tensor.Shard(0), tensor.Shard(self.sliced_dim)

    def _device_mesh(self, device_type: str) -> Any:
        """[W], or [E, s] where experts are sliced."""
        from torch.distributed.device_mesh import DeviceMesh

        slices = self.placement.slices
        if slices == 1:
            return DeviceMesh.from_group(self.mesh.group, device_type)
        ranks = torch.tensor(self.mesh.global_ranks).view(-1, slices)
        groups = list(slice_groups(self.mesh, slices))
        return DeviceMesh.from_group(groups, device_type, ranks, mesh_dim_names=("expert", "slice"))


def slice_groups(mesh: Mesh, slices: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """This rank's column and row of the mesh's ranks as [W/s, s]: those that hold its slice of other experts, and those
    that hold the other slices of its expert. All ranks of the mesh must call the first time."""
    row = mesh.rank // slices * slices
    # All ranks make their row first and their column second, so that none waits for one that waits for it.
    within = subgroup(mesh, range(row, row + slices), "slices of an expert")
    across = subgroup(mesh, range(mesh.rank % slices, mesh.world, slices), "one slice of all experts")
    return across, within


@dataclass(frozen=True, kw_only=True)
class OwnTensor(Shard):
    """A parameter that is nobody else's to put together: that of somebody's own expert module."""

    def __post_init__(self) -> None:
        pass

    @property
    def index(self) -> tuple[slice, ...]:
        return tuple(slice(0, size) for size in self.shape)

    def whole(self, local: torch.Tensor) -> torch.Tensor:
        return local

    def part(self, value: torch.Tensor) -> torch.Tensor:
        return value


def hold_own(module: nn.Module, mesh: Mesh, placement: Placement) -> None:
    """Declares all parameters of `module` to be this rank's own, as :func:`hold_shards`; state dicts give them as they
    are, under names that should therefore differ from rank to rank."""
    module._expert_shards = {  # type: ignore[assignment]
        name: OwnTensor(mesh=mesh, placement=placement, shape=tuple(parameter.shape))
        for name, parameter in module.named_parameters()
    }


def hold_shards(module: nn.Module, shards: Mapping[str, Shard]) -> None:
    """Declares parameters of `module` to be shards, by name.

    They are this rank's own: gradient averaging leaves them out (`tutelx.parallel`). `state_dict` gives them as
    DTensors of the whole shape, and `load_state_dict` takes whole tensors, plain or distributed in any way, and keeps
    this rank's part: checkpoints do not depend on the number of ranks. All ranks of the mesh must call.
    """
    parameters = dict(module.named_parameters())
    for name, shard in shards.items():
        if tuple(parameters[name].shape) != shard.local_shape:
            raise InvalidValueError(
                f"{name} has shape {tuple(parameters[name].shape)}, but rank {shard.mesh.rank} of {shard.mesh.world}"
                f" holds {shard.local_shape} of {shard.shape}"
            )
        if shard.placement.slices > 1:
            slice_groups(shard.mesh, shard.placement.slices)
    module._expert_shards = dict(shards)  # type: ignore[assignment]
    module.register_state_dict_post_hook(_give_whole)
    module.register_load_state_dict_pre_hook(_take_parts)


def shards_of(module: nn.Module) -> dict[str, Shard]:
    """What :func:`hold_shards` declared anywhere inside, by the parameter's name in `module`."""
    found = {}
    for prefix, child in module.named_modules():
        for name, shard in child.__dict__.get("_expert_shards", {}).items():
            found[f"{prefix}.{name}" if prefix else name] = shard
    return found


def _give_whole(module: nn.Module, state: dict[str, Any], prefix: str, metadata: object) -> None:
    from torch.distributed.tensor import DTensor

    for name, shard in module._expert_shards.items():  # type: ignore[union-attr, operator]
        value = state.get(prefix + name)
        if isinstance(value, DTensor):
            raise InvalidTypeError(
                f"{prefix}{name} is this rank's own, but something has distributed it again: leave"
                " tutelx.parallel.expert_parameters(model) out of it (fully_shard: ignored_params)"
            )
        # With keep_vars the parameter itself is asked for.
        if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
            state[prefix + name] = shard.whole(value)


def _take_parts(
    module: nn.Module,
    state: dict[str, Any],
    prefix: str,
    metadata: Mapping[str, Any],
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    assigned = metadata.get("assign_to_params_buffers", False)
    for name, shard in module._expert_shards.items():  # type: ignore[union-attr, operator]
        value = state.get(prefix + name)
        if isinstance(value, torch.Tensor):
            try:
                part = shard.part(value)
                # A view would keep the tensors of all experts alive.
                state[prefix + name] = part.clone(memory_format=torch.contiguous_format) if assigned else part
            except InvalidValueError as error:
                # load_state_dict raises it with what else is wrong; the value itself would have a wrong shape too.
                del state[prefix + name]
                errors.append(f"{prefix}{name}: {error}.")
