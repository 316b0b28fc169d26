"""Gradients of the mean of all ranks' losses, for every parameter alike.

Data parallelism averages a replicated parameter's gradients over its W ranks. An expert's gradient comes with the
tokens of all ranks that share the expert: it is that of the sum of their losses. Adding it up over the replicas of the
expert, if there are any, and dividing by W makes both the gradient of the same mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tutelx.comm.shards import Shard
from tutelx.errors import InvalidTypeError, InvalidValueError
from tutelx.parallel.parameters import Replication, own_parameters, replicated_parameters

if TYPE_CHECKING:
    from tutelx.parallel.parameters import GroupLike

_BUCKET = 2**25  # bytes that one all-reduce carries at most, unless a single gradient is larger
_MARK = "_tutelx_averaged"


def data_parallel(
    model: nn.Module, *, group: GroupLike | None = None, replicas: GroupLike | None = None, **options: Any
) -> DistributedDataParallel:
    """torch's DistributedDataParallel for a model with experts that are spread over ranks.

    It averages what is replicated and leaves the experts out; their gradients are brought to the same mean by
    :func:`average_expert_gradients`. Replicas of experts start with the values of the first of them.

    Args:
        group: the ranks that train on different data, as a process group or a mesh of one dimension; default: all.
        replicas: those among them that hold the same experts as this one; needed where the experts are spread over
            fewer ranks than the group has, such as inside a node with data parallelism across.
        options: of DistributedDataParallel.

    Raises:
        InvalidValueError: `group` and `replicas` do not fit how the experts are spread.
        InvalidTypeError: an argument is something else.
    """
    replication = Replication.of(model, group, replicas)
    average_expert_gradients(model, group=group, replicas=replicas)
    ignored = set(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    for name, parameter, shard in own_parameters(model):
        ignored.add(name)
        same = replication.of_shard(shard)
        if same is not None:
            dist.broadcast(parameter.detach(), dist.get_process_group_ranks(same)[0], group=same)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, sorted(ignored))
    return DistributedDataParallel(model, process_group=replication.group, **options)


def average_expert_gradients(
    model: nn.Module, *, group: GroupLike | None = None, replicas: GroupLike | None = None
) -> None:
    """From now on every backward leaves in the experts' `.grad` those of the mean of the group's losses.

    For whoever averages the other gradients himself: FSDP, with `fully_shard(model, ignored_params=set(
    expert_parameters(model)))`, or a loop of one's own. The same arguments and errors as :func:`data_parallel`.

    Gradients are divided, and added up over the replicas, as they arrive: each backward of an accumulation costs its
    own reduction, also under `no_sync`.
    """
    hooks = _Attach(model, Replication.of(model, group, replicas))
    _check_not_averaged(model)
    hooks.attach()
    # Parameters that are replaced or unfrozen later are found on the next call.
    model.register_forward_pre_hook(hooks)


def sync_gradients(model: nn.Module, *, group: GroupLike | None = None, replicas: GroupLike | None = None) -> None:
    """Once after backward, without a wrapper: every `.grad` becomes that of the mean of the group's losses.

    A parameter without a gradient counts as zero if another rank has one, and keeps none if no rank has. All ranks of
    the group must call. The same arguments as :func:`data_parallel`.

    Raises:
        InvalidValueError: `group` and `replicas` do not fit how the experts are spread, the experts' gradients are
            averaged already, or the ranks have different replicated parameters.
        InvalidTypeError: a gradient is sparse, or belongs to something that averages it itself (a DTensor).
    """
    replication = Replication.of(model, group, replicas)
    _check_not_averaged(model)
    own = own_parameters(model)
    shared = [parameter for parameter in replicated_parameters(model) if parameter.requires_grad]
    held = [parameter for _, parameter, shard in own if parameter.requires_grad and replication.of_shard(shard)]
    for parameter in shared + held:
        _check_dense(parameter)
    _check_equal(shared, replication.group)
    _add_up(shared, replication.group)
    if replication.replicas is not None:
        _add_up(held, replication.replicas)
    for parameter in shared + [parameter for _, parameter, _ in own]:
        if parameter.grad is not None:
            parameter.grad.div_(replication.world)


class _Attach:
    """Forward pre-hook: hooks for the gradients of the experts' parameters, once for each."""

    def __init__(self, model: nn.Module, replication: Replication) -> None:
        self.replication = replication
        # Where they are registered: parameters themselves may be replaced.
        self.places: list[tuple[nn.Module, str, Shard]] = []
        for name, _, shard in own_parameters(model):
            owner, _, attribute = name.rpartition(".")
            self.places.append((model.get_submodule(owner), attribute, shard))

    def __call__(self, model: nn.Module, inputs: object) -> None:
        self.attach()

    def attach(self) -> None:
        for owner, attribute, shard in self.places:
            parameter = owner._parameters.get(attribute)
            if parameter is not None and parameter.requires_grad and not getattr(parameter, _MARK, False):
                same = self.replication.of_shard(shard)
                parameter.register_hook(partial(_average, world=self.replication.world, replicas=same))
                setattr(parameter, _MARK, True)

    def __deepcopy__(self, memo: dict) -> _Attach:
        raise InvalidTypeError("a model whose experts' gradients are averaged cannot be copied: copy it before")


def _average(gradient: torch.Tensor, *, world: int, replicas: dist.ProcessGroup | None) -> torch.Tensor:
    mean = torch.div(gradient, world).contiguous()
    if replicas is not None:
        dist.all_reduce(mean, group=replicas)
    return mean


def _check_not_averaged(model: nn.Module) -> None:
    if any(getattr(parameter, _MARK, False) for _, parameter, _ in own_parameters(model)):
        raise InvalidValueError("the gradients of this model's experts are averaged already")


def _check_dense(parameter: nn.Parameter) -> None:
    from torch.distributed.tensor import DTensor

    gradient = parameter.grad
    if isinstance(gradient, DTensor) or isinstance(parameter, DTensor):
        raise InvalidTypeError(
            "a parameter is a DTensor, whose gradient its owner averages: use average_expert_gradients for the experts"
        )
    if gradient is not None and gradient.layout != torch.strided:
        raise InvalidTypeError(f"a gradient is {gradient.layout}, expected torch.strided")


def _check_equal(parameters: list[nn.Parameter], group: dist.ProcessGroup) -> None:
    """Before anything is reduced whose size depends on it."""
    if not parameters:
        return
    sizes = torch.tensor([len(parameters), sum(parameter.numel() for parameter in parameters)])
    both = torch.cat([sizes, -sizes]).to(parameters[0].device)
    dist.all_reduce(both, dist.ReduceOp.MAX, group)
    most, least = both[:2].tolist(), (-both[2:]).tolist()
    if most != least:
        raise InvalidValueError(
            f"this rank has {sizes[0]} replicated parameters of {sizes[1]} elements, but the group's ranks have between"
            f" {least[0]} of {least[1]} and {most[0]} of {most[1]}"
        )


def _add_up(parameters: list[nn.Parameter], group: dist.ProcessGroup) -> None:
    """Gradients become the sums of all ranks', in place."""
    if not parameters:
        return
    present = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.int32)
    present = present.to(parameters[0].device)
    dist.all_reduce(present, dist.ReduceOp.MAX, group)
    gradients = []
    for parameter, wanted in zip(parameters, present.tolist()):
        if wanted:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
    for bucket in _buckets(gradients):
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        dist.all_reduce(flat, group=group)
        for gradient, total in zip(bucket, flat.split([gradient.numel() for gradient in bucket])):
            gradient.copy_(total.view_as(gradient))


def _buckets(gradients: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Gradients of one dtype and device, in their order, that fit into one message."""
    alike: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
    for gradient in gradients:
        alike.setdefault((gradient.dtype, gradient.device), []).append(gradient)
    for each in alike.values():
        bucket: list[torch.Tensor] = []
        for gradient in each:
            if bucket and sum(other.nbytes for other in bucket) + gradient.nbytes > _BUCKET:
                yield bucket
                bucket = []
            bucket.append(gradient)
        yield bucket
