"""Weights of a list of experts in one storage, so that products of all experts at once need no copy of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import nn


def pack(weights: Sequence[torch.Tensor]) -> bool:
    """Moves E parameters of equal shape into one storage, one behind the other; they stay the same Parameter objects.

    Nothing else changes: values, gradients, names, what an optimizer knows. Each old storage is freed before the next
    parameter is moved, so that beside the new storage never more than one copy of a weight exists.

    Returns:
        Whether they lie so now. False where that could break something: parameters that are one, of subclasses
        (DTensor) or of several devices, and storages that something else looks at too (tied weights, FSDP).
    """
    if is_packed(weights):
        return True
    if not _movable(weights):
        return False
    first = weights[0]
    packed = torch.empty((len(weights), *first.shape), dtype=first.dtype, device=first.device)
    for place, weight in zip(packed.unbind(0), weights):
        place.copy_(weight.detach())
        weight.data = place
    return True


def is_packed(weights: Sequence[torch.Tensor]) -> bool:
    """Do they lie one behind the other in one storage, in order?"""
    first = weights[0]
    shape, dtype, size = first.shape, first.dtype, first.numel()
    if len(weights) < 2 or not size:
        return False
    offset, address = first.storage_offset(), first.data_ptr()
    step = size * first.element_size()
    # Equal steps of offset and address: the storage begins at the same place for all.
    return all(
        weight.shape == shape
        and weight.dtype == dtype
        and weight.storage_offset() == offset + e * size
        and weight.data_ptr() == address + e * step
        and weight.is_contiguous()
        for e, weight in enumerate(weights)
    )


def stacked(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """`torch.stack` of E weights [...] to [E, ...], without a copy where they are packed; differentiable in each.

    Raises:
        RuntimeError: in the backward, if a weight was changed in place since the forward.
    """
    if torch.compiler.is_compiling() or any(type(weight) not in _PLAIN for weight in weights) or not is_packed(weights):
        return torch.stack(tuple(weights))
    if torch.is_grad_enabled() and any(weight.requires_grad for weight in weights):
        return _Stacked.apply(*weights)
    return _view(weights)


_PLAIN = (torch.Tensor, nn.Parameter)


def _movable(weights: Sequence[torch.Tensor]) -> bool:
    first = weights[0]
    return (
        len(weights) > 1
        and len({id(weight) for weight in weights}) == len(weights)
        and all(
            type(weight) is nn.Parameter
            and (weight.shape, weight.dtype, weight.device) == (first.shape, first.dtype, first.device)
            and not weight.is_inference()
            and _is_alone(weight)
            for weight in weights
        )
    )


def _is_alone(weight: torch.Tensor) -> bool:
    """The storage is the weight's, whole, and nothing else looks at it."""
    storage = weight.untyped_storage()
    if weight.device.type == "meta" or storage.nbytes() != weight.numel() * weight.element_size():
        return False
    count = getattr(torch._C, "_storage_Use_Count", None)
    return count is not None and count(storage._cdata) <= _count_alone()


@lru_cache
def _count_alone() -> int:
    """What is counted for a storage that one tensor looks at, with the look itself."""
    alone = torch.empty(1)
    storage = alone.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata)


def _view(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    first = weights[0].detach()
    return first.as_strided((len(weights), *first.shape), (first.numel(), *first.stride()))


class _Stacked(torch.autograd.Function):
    """Every gradient is a view into that of the stack."""

    @staticmethod
    def forward(ctx, *weights):
        ctx.weights, ctx.versions = weights, [weight._version for weight in weights]
        return _view(weights)

    @staticmethod
    def backward(ctx, grad):
        for e, (weight, version) in enumerate(zip(ctx.weights, ctx.versions)):
            if weight._version != version:
                raise RuntimeError(
                    f"a weight of expert {e}, of shape {tuple(weight.shape)}, was changed in place since the forward:"
                    f" it is at version {weight._version}, expected {version}"
                )
        return grad.unbind(0)
