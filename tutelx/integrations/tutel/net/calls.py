"""What stands before and around every collective: who takes part, on which terms, and who is lost if it fails."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist

from tutelx import env
from tutelx.comm.agreement import agree_on_tensor, announced_failure
from tutelx.comm.failures import named_losses
from tutelx.comm.mesh import Mesh, as_mesh
from tutelx.errors import InvalidTypeError, InvalidValueError


def others(group: dist.ProcessGroup | None) -> Mesh | None:
    """The ranks that take part, all for `group=None`; None where this process is the only one.

    Raises:
        InvalidTypeError: `group` is no process group.
        InvalidValueError: this rank is not in it.
    """
    if not dist.is_initialized():
        if group is None:
            return None
        raise InvalidValueError("a group was given, but torch.distributed is not initialised in this process")
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise InvalidValueError(f"rank {dist.get_rank()} is not in the group")
    mesh = as_mesh(dist.group.WORLD if group is None else group, ranks_per_node=None)
    return mesh if mesh is not None and mesh.world > 1 else None


def others_by_node(group: dist.ProcessGroup | None) -> Mesh | None:
    """As :func:`others`, with the ranks per node from LOCAL_SIZE where LOCAL_WORLD_SIZE is not set.

    Raises:
        InvalidValueError: they are not known.
    """
    mesh = others(group)
    if mesh is not None and mesh.ranks_per_node is None and env.local_world_size() is None:
        mesh = as_mesh(mesh.group, ranks_per_node=env.local_size())
    if mesh is not None:
        mesh.check_nodes()
    return mesh


def checked(mesh: Mesh, call: str, tensor: torch.Tensor, check: Callable[[], None] = lambda: None) -> None:
    """Raises InvalidTypeError unless `tensor` is one, and what `check` raises; the others, about to agree, are told."""
    is_tensor = isinstance(tensor, torch.Tensor)
    with announced_failure(mesh, tensor.device if is_tensor else message_device(mesh)):
        if not is_tensor:
            raise InvalidTypeError(f"{call}: input is {type(tensor).__name__}, expected torch.Tensor")
        check()


def agreed(
    mesh: Mesh, call: str, tensor: torch.Tensor, *, how: str = "", same_size: bool = True
) -> AbstractContextManager[None]:
    """Agrees with the other ranks, which all must call; the collective itself runs in the context that is returned.

    Raises:
        RankMismatchError, RankFailedError: as `tutelx.comm.agreement.agree_on_tensor`.
    """
    number = agree_on_tensor(mesh, call, how, tensor, same_size=same_size)
    return named_losses(mesh, number, (mesh.group,))


def message_device(mesh: Mesh) -> torch.device:
    """Where a message of the group can lie that belongs to no tensor."""
    kinds = {device.type for device in mesh.group._device_types}
    return torch.device("cpu" if "cpu" in kinds else min(kinds))


def check_divides(call: str, tensor: torch.Tensor, dim: int, world: int) -> None:
    """Raises InvalidValueError unless `dim` is a dimension of the tensor that `world` ranks can share evenly."""
    check_dim(call, tensor, dim)
    if tensor.shape[dim] % world:
        shape = tuple(tensor.shape)
        raise InvalidValueError(f"{call}: dimension {dim} of shape {shape} does not divide among {world} ranks")


def check_dim(call: str, tensor: torch.Tensor, dim: int) -> None:
    """Raises InvalidValueError unless the tensor has this dimension, InvalidTypeError if it is no integer."""
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise InvalidTypeError(f"{call}: dim={dim!r} is {type(dim).__name__}, expected int")
    if not -tensor.dim() <= dim < tensor.dim():
        raise InvalidValueError(f"{call}: dim={dim}, but the input has shape {tuple(tensor.shape)}")
