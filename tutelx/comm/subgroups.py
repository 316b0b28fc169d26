"""Process groups of some ranks of a mesh, made by the ranks of the mesh alone."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from tutelx.comm.mesh import Mesh
from tutelx.errors import InvalidValueError

# By name, with the group they are parts of: a name may be given again after destroy_process_group.
_made: dict[str, tuple[dist.ProcessGroup, dist.ProcessGroup]] = {}


def subgroup(mesh: Mesh, ranks: Sequence[int], name: str) -> dist.ProcessGroup:
    """The group of these ranks of the mesh, in this order; made once, its members must call, this rank among them.

    `torch.distributed.new_group` needs every rank of the world, which a layer on some of them cannot ask for, and with
    `use_local_synchronization` it names the group after how many groups the rank has seen, which differs where a rank
    is in more groups than another: the members would wait for each other under two names. Here the name follows from
    the mesh's group.

    Args:
        ranks: ranks of the mesh.
        name: what the group is for; with the mesh and the ranks it is the group's identity.

    Raises:
        InvalidValueError: this rank is not among `ranks`.
    """
    if mesh.rank not in ranks:
        raise InvalidValueError(f"rank {mesh.rank} makes a group of the ranks {tuple(ranks)} that it is not in")
    full_name = f"tutelx:{mesh.group.group_name}:{name}:{'_'.join(map(str, ranks))}"
    parent, group = _made.get(full_name, (None, None))
    if parent is mesh.group and group is not None:
        return group
    members = [mesh.global_ranks[rank] for rank in ranks]
    backend = c10d.Backend(dist.get_backend_config(mesh.group))
    group, _ = c10d._new_process_group_helper(
        len(members),
        list(ranks).index(mesh.rank),
        members,
        backend,
        c10d._get_default_store(),
        full_name,  # type: ignore[arg-type]
        timeout=timeout_of(mesh.group),
    )
    c10d._world.pg_group_ranks[group] = {rank: place for place, rank in enumerate(members)}
    _made[full_name] = mesh.group, group
    return group


def forget() -> None:
    """Lets go of all groups that :func:`subgroup` has made; before the end of a process that destroys its groups."""
    _made.clear()


def timeout_of(group: dist.ProcessGroup) -> timedelta:
    """How long the group waits for a rank, which its parts shall wait too."""
    backend = c10d.Backend(dist.get_backend_config(group))
    options = getattr(group._get_backend(group._device_types[0]), "options", None)
    return getattr(options, "_timeout", None) or c10d._get_default_timeout(backend)
