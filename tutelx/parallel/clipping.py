"""The norm of all gradients, every expert counted once, and clipping by it."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import nn

from tutelx.errors import InvalidTypeError, InvalidValueError
from tutelx.parallel.parameters import own_parameters, replicated_parameters

_EPSILON = 1e-6  # as torch.nn.utils.clip_grad_norm_ adds it


def clip_grad_norm_(
    model: nn.Module, max_norm: float, *, norm_type: float = 2.0, error_if_nonfinite: bool = False
) -> torch.Tensor:
    """Scales all gradients so that their norm over all parameters and experts is at most `max_norm`.

    As `torch.nn.utils.clip_grad_norm_` on one process that holds every expert. Call it once the gradients are averaged
    (`data_parallel`, `sync_gradients`, FSDP): copies are then equal and count once. DTensors of `fully_shard` are
    understood. All ranks that share the experts must call.

    Args:
        max_norm: largest norm allowed.
        norm_type: p of the p-norm; may be infinity.

    Returns:
        The norm before, a scalar, equal on all ranks.

    Raises:
        InvalidValueError: `norm_type` is not positive, `max_norm` negative or NaN.
        InvalidTypeError: a gradient is a DTensor whose parts are not added up yet.
        RuntimeError: the norm is not finite, with `error_if_nonfinite`; on all ranks alike.
    """
    if not norm_type > 0:
        raise InvalidValueError(f"norm_type={norm_type} must be positive")
    if not max_norm >= 0:
        raise InvalidValueError(f"max_norm={max_norm} must not be negative")
    own = own_parameters(model)
    shared = [parameter.grad for parameter in replicated_parameters(model) if parameter.grad is not None]
    held = [parameter.grad for _, parameter, _ in own if parameter.grad is not None]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    norms = _norms_of_shared(shared, norm_type)
    for group in dict.fromkeys(shard.mesh.group for _, _, shard in own):
        here = [parameter for _, parameter, shard in own if shard.mesh.group is group]
        parts = [_norm(parameter.grad, norm_type) for parameter in here if parameter.grad is not None]
        # One dtype on all ranks, whichever of them have gradients.
        mine = _combine(parts, norm_type, device).to(_widest([parameter.dtype for parameter in here]))
        norms.append(_over_ranks(mine, norm_type, group))
    total = _combine(norms, norm_type, device)
    if error_if_nonfinite and not total.isfinite():
        raise RuntimeError(f"the norm of order {norm_type} of all gradients is {total.item()}")
    scale = (max_norm / (total + _EPSILON)).clamp(max=1.0)
    for gradient in shared + held:
        local = _local(gradient)
        local.mul_(scale.to(local.device))
    return total


def _norms_of_shared(gradients: list[torch.Tensor], norm_type: float) -> list[torch.Tensor]:
    """One norm of all plain tensors, and one of all DTensors that are spread in one way."""
    from torch.distributed.tensor import DTensor

    alike: dict[tuple, list[torch.Tensor]] = {}
    for gradient in gradients:
        spread: tuple = ()
        if isinstance(gradient, DTensor):
            if any(placement.is_partial() for placement in gradient.placements):
                raise InvalidTypeError(f"a gradient is {gradient.placements}, which is not added up yet")
            spread = gradient.device_mesh, *(not placement.is_replicate() for placement in gradient.placements)
        alike.setdefault(spread, []).append(gradient)
    found = []
    for spread, each in alike.items():
        norm = _combine([_norm(_local(gradient), norm_type) for gradient in each], norm_type, each[0].device)
        for dimension, sharded in enumerate(spread[1:]):
            if sharded:
                norm = _over_ranks(norm, norm_type, spread[0].get_group(dimension))
        found.append(norm)
    return found


def _over_ranks(norm: torch.Tensor, norm_type: float, group: dist.ProcessGroup) -> torch.Tensor:
    """The norm of what all ranks of the group have, given that of what this one has."""
    if math.isinf(norm_type):
        norm = norm.clone()
        dist.all_reduce(norm, dist.ReduceOp.MAX, group)
        return norm
    power = norm**norm_type
    dist.all_reduce(power, group=group)
    return power ** (1 / norm_type)


def _norm(gradient: torch.Tensor, norm_type: float) -> torch.Tensor:
    """In float32 at least; 0 for a rank that holds nothing."""
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    if gradient.numel() == 0:
        return torch.zeros((), dtype=dtype, device=gradient.device)
    return torch.linalg.vector_norm(gradient, norm_type, dtype=dtype)


def _combine(norms: list[torch.Tensor], norm_type: float, device: torch.device) -> torch.Tensor:
    if not norms:
        return torch.zeros((), device=device)
    widest = _widest([norm.dtype for norm in norms])
    return torch.linalg.vector_norm(torch.stack([norm.to(device, widest) for norm in norms]), norm_type)


def _widest(dtypes: list[torch.dtype]) -> torch.dtype:
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _local(gradient: torch.Tensor) -> torch.Tensor:
    from torch.distributed.tensor import DTensor

    return gradient.to_local() if isinstance(gradient, DTensor) else gradient
