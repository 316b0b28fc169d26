"""Collectives with a backward: each is one step there, and its adjoint on the way back, in the same group.

Symbol: W ranks of the group. Gradients may be differentiated again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist

from tutelx.comm._library import native
from tutelx.comm.call import node_groups
from tutelx.comm.mesh import Mesh
from tutelx.errors import InvalidValueError
from tutelx.integrations.tutel.net.calls import agreed, check_dim, check_divides, checked, others, others_by_node
from tutelx.integrations.tutel.net.simple import (
    Group,
    Op,
    as_bytes,
    simple_all_gather,
    simple_all_reduce,
    simple_all_to_all,
    simple_reduce_scatter,
    simple_split,
)

Step = Callable[[torch.Tensor], torch.Tensor]


class Pair(torch.autograd.Function):
    """there(x) forward, back(gradient) backward."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, there: Step, back: Step) -> torch.Tensor:
        ctx.there, ctx.back = there, back
        return there(x)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return Pair.apply(grad, ctx.back, ctx.there), None, None


def all_to_all_single(input: torch.Tensor, group: Group = None) -> torch.Tensor:
    """`simple_all_to_all` with gradients."""
    step = partial(simple_all_to_all, group=group)
    return Pair.apply(input, step, step)


def all_to_all(
    input: torch.Tensor,
    input_dim: int,
    output_dim: int,
    group: Group = None,
    background: bool = False,
    use_2dh: bool = False,
):
    """Gathers dimension `input_dim` from all ranks and deals dimension `output_dim` out among them.

    [.., X, .., Y, ..] with X = `input_dim`, Y = `output_dim` becomes [.., W*X, .., Y/W, ..]: the flexible layout of
    Tutel is `all_to_all(y, 1, 0)` there, [E, C, M] -> [E/W, W*C, M], and `all_to_all(y, 0, 1)` back.

    Args:
        background: return a function that waits and then returns the tensor; one rank or equal dims: at once.
        use_2dh: send inside the nodes first, then between them; the ranks per node come from LOCAL_WORLD_SIZE, which
            torchrun sets, or LOCAL_SIZE. The result is the same bit for bit.

    Raises:
        InvalidValueError: a dimension that is none, `output_dim` that does not divide by W, unknown ranks per node.
    """
    mesh = others_by_node(group) if use_2dh else others(group)
    if mesh is None or input_dim == output_dim:
        return (lambda *args: input) if background else input

    def check() -> None:
        check_dim("all_to_all", input, input_dim)
        check_divides("all_to_all", input, output_dim, mesh.world)

    checked(mesh, "all_to_all", input, check)
    gathered, dealt = input_dim % input.dim(), output_dim % input.dim()
    parts = input.unflatten(dealt, (mesh.world, input.shape[dealt] // mesh.world)).movedim(dealt, 0)
    if use_2dh:
        step = partial(_hierarchical, mesh)
        arrived = Pair.apply(parts, step, step)
    elif not background:
        arrived = all_to_all_single(parts, mesh.group)
    else:
        return _later(parts, mesh, gathered)
    result = arrived.movedim(0, gathered).flatten(gathered, gathered + 1)
    return (lambda *args: result) if background else result


def all_gather(input: torch.Tensor, dim: int, fused: bool = False, group: Group = None) -> torch.Tensor:
    """All ranks' tensors behind one another along `dim`.

    fused: the loss is the sum of all ranks' losses, so that gradients are added up. Without it every rank goes on with
        the same numbers, has the whole gradient already and keeps its part.
    """
    there, back = simple_all_gather, simple_reduce_scatter if fused else simple_split
    return _along(input, dim, group, "all_gather", there, back)


def spatial_split(input: torch.Tensor, dim: int, group: Group = None) -> torch.Tensor:
    """This rank's part of `dim`, of W equal ones, where every rank holds the same tensor; gradients are gathered.

    Raises:
        InvalidValueError: `dim` does not divide by W.
    """
    return _along(input, dim, group, "spatial_split", simple_split, simple_all_gather)


def reduce_scatter(input: torch.Tensor, dim: int, group: Group = None) -> torch.Tensor:
    """This rank's part of `dim` of the sum over all ranks.

    Raises:
        InvalidValueError: `dim` does not divide by W.
    """
    return _along(input, dim, group, "reduce_scatter", simple_reduce_scatter, simple_all_gather)


def allreduce_forward(input: torch.Tensor, op: Op = dist.ReduceOp.SUM, group: Group = None) -> torch.Tensor:
    """The reduction over all ranks, which all go on with the same numbers: each has its whole gradient already.

    Raises:
        InvalidValueError: `input` needs a gradient, which is defined here for SUM and AVG only.
    """
    world = 1 if (mesh := others(group)) is None else mesh.world
    if op not in (dist.ReduceOp.SUM, dist.ReduceOp.AVG) and isinstance(input, torch.Tensor) and input.requires_grad:
        raise InvalidValueError(f"allreduce_forward: op={op.name} has no gradient here, expected SUM or AVG")
    back: Step = (lambda grad: grad / world) if op == dist.ReduceOp.AVG else _alias
    return Pair.apply(input, partial(simple_all_reduce, group=group, op=op), back)


def allreduce_backward(input: torch.Tensor, op: Op = dist.ReduceOp.SUM, group: Group = None) -> torch.Tensor:
    """The input itself; its gradient is reduced over all ranks."""
    return Pair.apply(input, _alias, partial(simple_all_reduce, group=group, op=op))


def zero_gather(input: torch.Tensor, full_shape: Sequence[int] | None = None, group: Group = None) -> torch.Tensor:
    """The inverse of :func:`zero_scatter`: all ranks' parts as one tensor, without what was padded.

    full_shape: of the result; by default dimension 0 is W times as long. Gradients are added up over ranks.

    Raises:
        InvalidValueError: the parts have fewer elements together than `full_shape`.
    """
    whole = _along(input, 0, group, "zero_gather", simple_all_gather, simple_reduce_scatter)
    if full_shape is None:
        return whole
    shape = torch.Size(full_shape)
    if shape.numel() > whole.numel():
        raise InvalidValueError(f"zero_gather: full_shape={tuple(shape)}, but the ranks hold {whole.numel()} elements")
    return whole.reshape(-1)[: shape.numel()].view(shape)


def zero_scatter(
    input: torch.Tensor, scatter_fn: Callable[..., torch.Tensor], group: Group = None
) -> tuple[torch.Tensor, torch.Size]:
    """`scatter_fn(flat, group=group)` on all elements, padded with zeros so that W divides them; and the input's shape.

    scatter_fn: `simple_split`, where all ranks hold the same, or `simple_reduce_scatter`, where they are to be added.
    """
    world = 1 if (mesh := others(group)) is None else mesh.world
    flat = input.reshape(-1)
    missing = -flat.numel() % world
    return scatter_fn(torch.nn.functional.pad(flat, (0, missing)) if missing else flat, group=group), input.shape


def _along(input: torch.Tensor, dim: int, group: Group, call: str, there: Callable, back: Callable) -> torch.Tensor:
    mesh, check = others(group), partial(check_dim, call, input, dim)
    if mesh is None:
        check()
    else:
        checked(mesh, call, input, check)
    input = input.transpose(0, dim)
    output = Pair.apply(input, partial(_fresh, there, group), partial(_fresh, back, group))
    return output.transpose(0, dim)


def _fresh(function: Callable, group: Group, x: torch.Tensor) -> torch.Tensor:
    """A view that leaves an autograd function could not be changed in place."""
    return function(x, group).clone() if function is simple_split else function(x, group)


def _alias(x: torch.Tensor) -> torch.Tensor:
    return x.view_as(x)


def _hierarchical(mesh: Mesh, parts: torch.Tensor) -> torch.Tensor:
    """Part i to rank i, [W, ...], through the node."""
    with agreed(mesh, "all_to_all", parts, how=f"2dh, {mesh.check_nodes()} ranks a node"):
        sent = parts.detach().contiguous()
        rows = as_bytes(sent).view(mesh.world, sent.nbytes // mesh.world)
        exchange = native.Exchange(mesh.group, *node_groups(mesh))
        arrived = exchange.all_to_all(rows, [[1] * mesh.world] * mesh.world)
    return arrived.view(-1).view(parts.dtype).view(parts.shape)


def _later(parts: torch.Tensor, mesh: Mesh, gathered: int) -> Callable[..., torch.Tensor]:
    output, wait = simple_all_to_all(parts, mesh.group, background=True)
    result: list[torch.Tensor] = []

    def arrive(_: torch.Tensor) -> torch.Tensor:
        wait()
        return output

    def finish(*args: object) -> torch.Tensor:
        if not result:
            arrived = Pair.apply(parts, arrive, partial(simple_all_to_all, group=mesh.group))
            result.append(arrived.movedim(0, gathered).flatten(gathered, gathered + 1))
        return result[0]

    return finish
