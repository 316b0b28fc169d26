"""Collectives in which every rank may have another number of elements, on several tensors at once.

Symbol: W ranks of the group.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch.nn import functional as F

from tutelx.comm.mesh import Mesh
from tutelx.errors import InvalidTypeError, InvalidValueError
from tutelx.integrations.tutel.net.calls import agreed, checked, others
from tutelx.integrations.tutel.net.differentiable import Pair
from tutelx.integrations.tutel.net.simple import Group, as_bytes, gather, simple_all_gather, simple_reduce_scatter

Datas = Sequence[torch.Tensor]


def batch_all_to_all_v(
    datas: Datas, partition_sizes: Sequence[int] | torch.Tensor, group: Group = None
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Of each tensor, flattened, the first `partition_sizes[0]` elements go to rank 0, the next to rank 1, and so on.

    Args:
        datas: tensors of equally many elements, whose number and dtypes are the same on all ranks.
        partition_sizes: W counts, for all of them.

    Returns:
        What arrived, flat, in the order of the ranks; and how many elements came from each, [W] int64 on the tensors'
        device. Gradients go back to where the elements came from.

    Raises:
        InvalidValueError: counts that are no W, negative, or do not add up to the elements of each tensor; no tensors.
        InvalidTypeError: `datas` is no list or tuple of tensors.
    """
    mesh = others(group)
    world = 1 if mesh is None else mesh.world
    call = "batch_all_to_all_v"

    def check() -> None:
        _check_datas(call, datas)
        sizes = list(map(int, partition_sizes))
        if len(sizes) != world or min(sizes) < 0:
            raise InvalidValueError(f"{call}: partition_sizes={sizes}, expected {world} counts of elements")
        if sum(sizes) != datas[0].numel():
            raise InvalidValueError(f"{call}: partition_sizes={sizes} add up to {sum(sizes)}, not {datas[0].numel()}")

    if mesh is None:
        check()
        return [data.reshape(-1) for data in datas], _sizes(map(int, partition_sizes), datas)
    checked(mesh, call, _first(datas), check)
    sent = list(map(int, partition_sizes))
    with agreed(mesh, call, datas[0], how=_how(datas), same_size=False):
        theirs = _exchanged_sizes(mesh, sent, datas[0].device)
        there, back = partial(_exchange, mesh, sent, theirs), partial(_exchange, mesh, theirs, sent)
        return [Pair.apply(data.reshape(-1), there, back) for data in datas], _sizes(theirs, datas)


def batch_all_gather_v(datas: Datas, group: Group = None) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Of each tensor, flattened, those of all ranks behind one another.

    Args:
        datas: tensors of equally many elements, whose number and dtypes are the same on all ranks.

    Returns:
        The gathered tensors, flat; and how many elements came from each rank, [W] int64 on the tensors' device.
        Gradients are added up over ranks.

    Raises:
        InvalidValueError: no tensors, or tensors of different numbers of elements.
        InvalidTypeError: `datas` is no list or tuple of tensors.
    """
    mesh, call = others(group), "batch_all_gather_v"
    if mesh is None:
        _check_datas(call, datas)
        return [data.reshape(-1) for data in datas], _sizes([datas[0].numel()], datas)
    checked(mesh, call, _first(datas), partial(_check_datas, call, datas))
    with agreed(mesh, call, datas[0], how=_how(datas), same_size=False):
        table = datas[0].new_empty(mesh.world, dtype=torch.int64)
        gather(table, table.new_tensor([datas[0].numel()]), mesh.group)
    sizes, longest = table.tolist(), int(table.max())
    there, back = partial(simple_all_gather, group=mesh.group), partial(simple_reduce_scatter, group=mesh.group)
    gathered = []
    for data in datas:
        # Backends gather equal parts; those of the shorter ranks travel padded.
        padded = F.pad(data.reshape(1, -1), (0, longest - data.numel()))
        rows = Pair.apply(padded, there, back)
        gathered.append(torch.cat([row[:size] for row, size in zip(rows, sizes)]))
    return gathered, table


def _exchange(mesh: Mesh, sent: list[int], received: list[int], x: torch.Tensor) -> torch.Tensor:
    output, width = x.new_empty(sum(received)), x.element_size()
    dist.all_to_all_single(
        as_bytes(output),
        as_bytes(x.detach().contiguous()),
        [size * width for size in received],
        [size * width for size in sent],
        group=mesh.group,
    )
    return output


def _exchanged_sizes(mesh: Mesh, sent: list[int], device: torch.device) -> list[int]:
    theirs = torch.empty(mesh.world, dtype=torch.int64, device=device)
    dist.all_to_all_single(theirs, torch.tensor(sent, device=device), group=mesh.group)
    return theirs.tolist()


def _check_datas(call: str, datas: Datas) -> None:
    if not isinstance(datas, (list, tuple)) or not all(isinstance(data, torch.Tensor) for data in datas):
        raise InvalidTypeError(f"{call}: datas is {type(datas).__name__}, expected a list or tuple of tensors")
    if not datas:
        raise InvalidValueError(f"{call}: datas is empty, expected one tensor at least")
    many = [data.numel() for data in datas]
    if len(set(many)) > 1:
        raise InvalidValueError(f"{call}: the tensors have {many} elements, expected equally many each")


def _first(datas: Datas) -> torch.Tensor:
    """One whose device tells where the group's messages travel."""
    found = datas[0] if isinstance(datas, (list, tuple)) and datas else None
    return found if isinstance(found, torch.Tensor) else torch.empty(0)


def _how(datas: Datas) -> str:
    return ",".join(str(data.dtype).removeprefix("torch.") for data in datas)


def _sizes(sizes, datas: Datas) -> torch.Tensor:
    return torch.tensor(list(sizes), dtype=torch.int64, device=datas[0].device)
