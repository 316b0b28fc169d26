"""Mesh: the ranks that share one layer's experts, and how many of them sit on a node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from tutelx import env
from tutelx.errors import InvalidTypeError, InvalidValueError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    MeshLike = DeviceMesh | dist.ProcessGroup


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """One process group and its shape.

    ranks_per_node: ranks of the group on each node, None where that is unknown or uneven; `origin` says where the
        number comes from, or why there is none.
    """

    group: dist.ProcessGroup
    rank: int
    world: int
    ranks_per_node: int | None
    origin: str

    @property
    def global_ranks(self) -> tuple[int, ...]:
        """The default group's rank of each rank of this group."""
        return tuple(dist.get_process_group_ranks(self.group))

    def check_nodes(self) -> int:
        """ranks_per_node, for what needs it.

        Raises:
            InvalidValueError: it is not known, or differs from node to node.
        """
        if self.ranks_per_node is None:
            raise InvalidValueError(f"all_to_all='2dh' needs the ranks per node: {self.origin}")
        return self.ranks_per_node

    def __deepcopy__(self, memo: dict) -> Mesh:
        return self  # a process group has no copy


def as_mesh(mesh: MeshLike | None, *, ranks_per_node: int | None = None) -> Mesh | None:
    """What `mesh=` means: a 1-D DeviceMesh, a 2-D one (nodes, ranks of a node), a process group, or None for none.

    Args:
        ranks_per_node: as given; else the second size of a 2-D mesh; else from LOCAL_WORLD_SIZE, which torchrun sets.

    Raises:
        InvalidTypeError: `mesh` is something else.
        InvalidValueError: a mesh of three dimensions or more, a group that this rank is not in, a `ranks_per_node`
            that does not divide the group or contradicts the mesh.
    """
    if mesh is None:
        if ranks_per_node is not None:
            raise InvalidValueError(f"ranks_per_node={ranks_per_node} was given, but mesh is None")
        return None
    columns = None
    group: Any = mesh
    if _is_device_mesh(mesh):
        shape = tuple(mesh.shape)  # type: ignore[union-attr]
        if len(shape) > 2:
            raise InvalidValueError(f"mesh has shape {shape}, expected one or two dimensions; take mesh['name']")
        columns = shape[1] if len(shape) == 2 else None
        group = (mesh if len(shape) == 1 else mesh._flatten()).get_group()  # type: ignore[union-attr]
    if not isinstance(group, dist.ProcessGroup):
        raise InvalidTypeError(f"mesh is {type(mesh).__name__}, expected DeviceMesh, ProcessGroup or None")
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        raise InvalidValueError(f"rank {dist.get_rank()} is not in the group {dist.get_process_group_ranks(group)}")
    size, origin = _ranks_per_node(group, world, columns, ranks_per_node)
    return Mesh(group=group, rank=rank, world=world, ranks_per_node=size, origin=origin)


def _is_device_mesh(mesh: object) -> bool:
    from torch.distributed.device_mesh import DeviceMesh

    return isinstance(mesh, DeviceMesh)


def _ranks_per_node(
    group: dist.ProcessGroup, world: int, columns: int | None, given: int | None
) -> tuple[int | None, str]:
    if given is not None:
        if isinstance(given, bool) or not isinstance(given, int):
            raise InvalidTypeError(f"ranks_per_node={given!r} is {type(given).__name__}, expected int")
        if given < 1 or world % given:
            raise InvalidValueError(f"ranks_per_node={given} does not divide the group's {world} ranks")
        if columns not in (None, given):
            raise InvalidValueError(f"ranks_per_node={given} contradicts the mesh, which has {columns} ranks a node")
        return given, "given"
    if columns is not None:
        return columns, "the mesh's second dimension"
    local = env.local_world_size()
    if local is None:
        return None, "give ranks_per_node, a 2-D mesh, or set LOCAL_WORLD_SIZE"
    # Launchers number ranks node by node.
    nodes = [rank // local for rank in dist.get_process_group_ranks(group)]
    runs = [nodes.count(node) for node in dict.fromkeys(nodes)]
    in_order = nodes == [node for node in dict.fromkeys(nodes) for _ in range(nodes.count(node))]
    if len(set(runs)) > 1 or not in_order:
        return None, f"with LOCAL_WORLD_SIZE={local} the group's ranks lie on the nodes {nodes}, unevenly"
    return runs[0], f"LOCAL_WORLD_SIZE={local}"
