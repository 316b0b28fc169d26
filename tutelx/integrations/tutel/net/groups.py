"""Ranks, and groups of them: the world as `group_count` groups of neighbours (model) and the groups across (data)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from tutelx import env
from tutelx.comm.agreement import agree_on_tensor
from tutelx.comm.mesh import as_mesh
from tutelx.comm.subgroups import forget, subgroup
from tutelx.errors import InvalidTypeError, InvalidValueError
from tutelx.integrations.tutel.net.calls import message_device, others

Group = dist.ProcessGroup | None

BACKENDS = {"nccl": "cuda", "gloo": "cpu"}

# By parent and count: a script that asks twice gets the same object.
_made: dict[tuple[Group, int], DistributedProperties] = {}


@dataclass(eq=False, kw_only=True)
class DistributedProperties:
    """Where this process stands.

    global_size, global_rank: of the world. local_rank, local_size: on this host.
    group_count, data_rank: how many model groups there are, and the place of this rank's among them.
    model_size, model_rank: of this rank's model group.
    local_device: None where `create_groups_from_world` was not asked to initialise and no one was before.
    data_group, model_group, global_group: None in a process without others.
    is_distributed: torch.distributed is initialised. dist_print: prints on the first rank of the world only.
    """

    global_size: int
    global_rank: int
    local_rank: int
    local_size: int
    group_count: int
    data_rank: int
    model_size: int
    model_rank: int
    local_device: torch.device | None
    data_group: Group
    model_group: Group
    global_group: Group
    is_distributed: bool
    dist_print: Callable[..., None]
    is_cuda: bool


def get_world_size(group: Group = None) -> int:
    """Ranks of the group, 1 in a process without others; -1 where this rank is not in it."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def get_world_rank(group: Group = None) -> int:
    """This rank in the group, 0 in a process without others; -1 where it is not in it."""
    return dist.get_rank(group) if dist.is_initialized() else 0


def barrier(group: Group = None) -> None:
    """Returns once all ranks of the group have called.

    Raises:
        RankFailedError: one does not come within the group's timeout.
        RankMismatchError: one calls something else.
    """
    mesh = others(group)
    if mesh is not None:
        agree_on_tensor(mesh, "barrier", "", torch.empty(0, device=message_device(mesh)))


def create_standalone_group() -> Group:
    """The group of this rank alone, for which no other has to call; None in a process without others."""
    if not dist.is_initialized():
        return None
    mesh = as_mesh(dist.group.WORLD)
    assert mesh is not None
    return subgroup(mesh, [mesh.rank], "standalone")


def create_groups_from_world(
    group_count: int, include_init: str | None = None, parent_group: Group = None
) -> DistributedProperties:
    """Divides the ranks, in their order, into `group_count` model groups; data groups have one rank of each of them.

    All ranks of the parent must call. The same call gives the same object again.

    Args:
        group_count: a negative number -n asks for groups of n ranks.
        include_init: "gloo" or "nccl": initialise torch.distributed from what torchrun, or Open MPI's mpiexec with
            MASTER_ADDR, tells this process, unless that was done before; a process that was started by itself stays so.
        parent_group: whose ranks are divided, all by default.

    Raises:
        InvalidValueError: counts that do not divide the ranks, another backend than the one in use, "nccl" without a
            GPU, `include_init` together with a group of some of the ranks.
        InvalidTypeError: `group_count` is no integer.
    """
    if isinstance(group_count, bool) or not isinstance(group_count, int):
        raise InvalidTypeError(f"group_count={group_count!r} is {type(group_count).__name__}, expected int")
    if include_init is not None:
        _initialise(include_init, parent_group)
    initialised = dist.is_initialized()
    parent = (parent_group or dist.group.WORLD) if initialised else None
    known = _made.get((parent, group_count))
    if known is not None and (include_init is None or known.local_device is not None):
        return known
    size, rank = get_world_size(parent), get_world_rank(parent)
    count = size // -group_count if group_count < 0 else group_count
    if count < 1 or size % count or (group_count < 0 and size % -group_count):
        raise InvalidValueError(f"group_count={group_count} does not divide {size} ranks")
    model_size = size // count
    group, place = divmod(rank, model_size)
    model_group = data_group = parent
    if initialised:
        mesh = as_mesh(parent)
        assert mesh is not None
        # The model group first on every rank, so that none waits for one that waits for it.
        if model_size < size:
            model_group = subgroup(mesh, range(group * model_size, (group + 1) * model_size), "model")
        if count < size:
            data_group = subgroup(mesh, range(place, size, model_size), "data")
    global_rank = get_world_rank()
    local_rank, device = _place(include_init)
    found = DistributedProperties(
        global_size=get_world_size(),
        global_rank=global_rank,
        local_rank=local_rank,
        local_size=env.local_world_size() or 1,
        group_count=count,
        data_rank=group,
        model_size=model_size,
        model_rank=place,
        local_device=device,
        data_group=data_group,
        model_group=model_group,
        global_group=dist.group.WORLD if initialised else None,
        is_distributed=initialised,
        dist_print=print if global_rank == 0 else _silent,
        is_cuda=device is not None and device.type == "cuda",
    )
    _made[parent, group_count] = found
    return found


def close() -> None:
    """Destroys all groups of the process and lets go of them: held up to its very end, one may abort it there."""
    for found in _made.values():
        found.data_group = found.model_group = found.global_group = None
    _made.clear()
    forget()
    if dist.is_initialized():
        dist.destroy_process_group()


def _initialise(backend: str, parent_group: Group) -> None:
    if backend not in BACKENDS:
        raise InvalidValueError(f"backend={backend!r}, expected one of {', '.join(map(repr, BACKENDS))}")
    if parent_group is not None and parent_group is not dist.group.WORLD:
        raise InvalidValueError(f"include_init={backend!r} initialises all ranks, but parent_group has some of them")
    if backend == "nccl" and not torch.cuda.is_available():
        raise InvalidValueError("backend='nccl' needs a GPU, and torch sees none; backend='gloo' runs on the CPU")
    if dist.is_initialized():
        config = dist.get_backend_config()
        if f"{BACKENDS[backend]}:{backend}" not in config:
            raise InvalidValueError(f"backend={backend!r}, but torch.distributed is initialised with {config!r}")
        return
    seconds = env.group_timeout()
    timeout = None if seconds is None else timedelta(seconds=seconds)
    mpi = None if env.is_torchrun() else env.mpi_place()
    if mpi is not None:
        rank, world, _ = mpi
        address, port = env.master()
        if address is None and world > 1:
            raise InvalidValueError(f"MASTER_ADDR is not set, and mpiexec started {world} ranks: give -x MASTER_ADDR=")
        where = f"tcp://{address or 'localhost'}:{port or 23456}"
        dist.init_process_group(backend, init_method=where, rank=rank, world_size=world, timeout=timeout)
    elif not (missing := env.missing_rendezvous()):
        dist.init_process_group(backend, timeout=timeout)
    elif env.launched_ranks() > 1:
        raise InvalidValueError(f"WORLD_SIZE={env.launched_ranks()}, but {', '.join(missing)} is not set")


def _place(backend: str | None) -> tuple[int, torch.device | None]:
    """This rank's place on its host, and its device: the last GPU where it sees fewer, as each may be shown its own."""
    mpi = None if env.is_torchrun() else env.mpi_place()
    local = env.local_rank() if mpi is None else mpi[2]
    kind = None if backend is None else BACKENDS[backend]
    if kind is None and dist.is_initialized():
        config = dist.get_backend_config()
        kind = next((device for name, device in BACKENDS.items() if f"{device}:{name}" in config), None)
    if kind != "cuda":
        return local, None if kind is None else torch.device(kind)
    local = min(local, torch.cuda.device_count() - 1)
    torch.cuda.set_device(local)
    return local, torch.device("cuda", local)


def _silent(*args: object, **kwargs: object) -> None:
    pass
