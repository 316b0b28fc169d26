"""Collectives without a backward. Symbol: W ranks of the group.

`simple_all_reduce` is the exception that Tutel's own is: its gradient passes to the input unchanged. On one rank all of
them return their input.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from tutelx.errors import InvalidValueError
from tutelx.integrations.tutel.net.calls import agreed, check_divides, checked, others

Group = dist.ProcessGroup | None
Op = dist.ReduceOp.RedOpType


def simple_broadcast(input: torch.Tensor, src: int = 0, group: Group = None) -> torch.Tensor:
    """Overwrites `input` with that of rank `src`, counted in the world, and returns it.

    Raises:
        InvalidValueError: `src` is not in the group.
        RankMismatchError, RankFailedError: as every collective here, see `tutelx.integrations.tutel.net`.
    """
    mesh = others(group)
    if mesh is None:
        return input

    def check() -> None:
        if src not in mesh.global_ranks:
            raise InvalidValueError(f"simple_broadcast: src={src} is not in the group {mesh.global_ranks}")

    checked(mesh, "simple_broadcast", input, check)
    with agreed(mesh, "simple_broadcast", input, how=f"src={src}"):
        own = input.detach()
        sent = own.contiguous()
        dist.broadcast(sent, src=src, group=mesh.group)
        if sent is not own:
            own.copy_(sent)
    return input


def simple_all_reduce(
    input: torch.Tensor, group: Group = None, op: Op = dist.ReduceOp.SUM, inplace: bool = False
) -> torch.Tensor:
    """The reduction over all ranks, elementwise: a new tensor, or `input` itself with `inplace`."""
    mesh = others(group)
    if mesh is None:
        return input
    checked(mesh, "simple_all_reduce", input)
    with agreed(mesh, "simple_all_reduce", input, how=_name(op)):
        output = input if inplace else input.clone(memory_format=torch.contiguous_format)
        own = output.detach()
        reduced = own.contiguous()
        _reduced(op, mesh.group, lambda known: dist.all_reduce(reduced, op=known, group=mesh.group), reduced)
        if reduced is not own:
            own.copy_(reduced)
    return output


def simple_all_to_all(input: torch.Tensor, group: Group = None, background: bool = False):
    """Part i of dimension 0, of W equal ones, goes to rank i; what arrives lies in the order of the ranks.

    Returns:
        The tensor, of the input's shape; with `background` it and the function that waits until it is there.

    Raises:
        InvalidValueError: dimension 0 does not divide by W.
    """
    mesh = others(group)
    if mesh is None:
        return (input.contiguous(), lambda *args: None) if background else input.contiguous()
    call = "simple_all_to_all"
    checked(mesh, call, input, lambda: check_divides(call, input, 0, mesh.world))
    with agreed(mesh, call, input):
        sent = input.detach().contiguous()
        output = torch.empty_like(sent)
        work = dist.all_to_all_single(as_bytes(output), as_bytes(sent), group=mesh.group, async_op=background)
    if not background:
        return output

    def wait(*args: object, held: torch.Tensor = sent) -> None:  # what is sent must live until it has gone
        work.wait()

    return output, wait


def simple_split(input: torch.Tensor, group: Group = None) -> torch.Tensor:
    """This rank's part of dimension 0, of W equal ones; nothing travels.

    Raises:
        InvalidValueError: dimension 0 does not divide by W.
    """
    mesh = others(group)
    if mesh is None:
        return input
    check_divides("simple_split", input, 0, mesh.world)
    return input.contiguous().chunk(mesh.world, dim=0)[mesh.rank]


def simple_reduce_scatter(input: torch.Tensor, group: Group = None, op: Op = dist.ReduceOp.SUM) -> torch.Tensor:
    """This rank's part of dimension 0 of the reduction over all ranks.

    Raises:
        InvalidValueError: dimension 0 does not divide by W.
    """
    mesh = others(group)
    if mesh is None:
        return input
    call = "simple_reduce_scatter"
    checked(mesh, call, input, lambda: check_divides(call, input, 0, mesh.world))
    with agreed(mesh, call, input, how=_name(op)):
        sent = input.detach().contiguous()
        output = sent.new_empty((sent.shape[0] // mesh.world, *sent.shape[1:]))
        whole, part = sent.view(-1), output.view(-1)
        _reduced(op, mesh.group, lambda known: _reduce_scatter(part, whole, known, mesh.group), output)
    return output


def simple_all_gather(input: torch.Tensor, group: Group = None) -> torch.Tensor:
    """All ranks' tensors behind one another along dimension 0; numbers become a vector [W]."""
    mesh = others(group)
    if mesh is None:
        return input
    checked(mesh, "simple_all_gather", input)
    with agreed(mesh, "simple_all_gather", input):
        sent = input.detach().contiguous()
        rows = sent.shape[0] if sent.dim() else 1
        output = sent.new_empty((mesh.world * rows, *sent.shape[1:]))
        gather(as_bytes(output), as_bytes(sent), mesh.group)
    return output


def gather(output: torch.Tensor, input: torch.Tensor, group: dist.ProcessGroup) -> None:
    """All ranks' flat tensors into one, under the name that this version of torch does not call deprecated."""
    getattr(dist, "all_gather_single", dist.all_gather_into_tensor)(output, input, group=group)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory: what only moves can so be of any dtype, whatever the backend knows."""
    return tensor.reshape(-1).view(torch.uint8)


def _reduced(op: Op, group: dist.ProcessGroup, run: Callable[[Op], object], result: torch.Tensor) -> None:
    """Gloo has no mean."""
    if op == dist.ReduceOp.AVG and dist.get_backend(group) != "nccl":
        run(dist.ReduceOp.SUM)
        result.div_(group.size())
    else:
        run(op)


def _reduce_scatter(output: torch.Tensor, input: torch.Tensor, op: Op, group: dist.ProcessGroup) -> None:
    getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)(output, input, op=op, group=group)


def _name(op: Op) -> str:
    return str(op).rpartition(".")[2]
