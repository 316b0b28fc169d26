"""What the arguments of a script's layer mean. M model dim, T tokens."""

from __future__ import annotations

import re

import torch

from tutelx.errors import InvalidTypeError, InvalidValueError


def tokens(input: object, reserve_dims: int, model_dim: int, weight: torch.Tensor | None) -> torch.Tensor:
    """input [..., M in `reserve_dims` dimensions] -> [T, M] in the dtype of `weight`; under autocast as it is.

    Raises:
        InvalidTypeError, InvalidValueError: no tensor, another shape.
    """
    if not isinstance(input, torch.Tensor):
        raise InvalidTypeError(f"input is {type(input).__name__}, expected torch.Tensor")
    if not 1 <= reserve_dims < input.dim():
        raise InvalidValueError(f"reserve_dims={reserve_dims} of an input {tuple(input.shape)}: no dimension is left")
    if input.shape[-reserve_dims:].numel() != model_dim:
        raise InvalidValueError(
            f"input has shape {tuple(input.shape)}, expected model_dim={model_dim} numbers in the last {reserve_dims}"
            " dimensions"
        )
    x_TM = input.reshape(input.shape[:-reserve_dims].numel(), model_dim)
    if weight is None or torch.is_autocast_enabled(input.device.type):
        return x_TM
    return x_TM.to(weight.dtype)


def degree(parallel_type: str, valid: list[int]) -> tuple[int, bool]:
    """The shard degree, and whether the planner may choose another."""
    named = {"data": 1, "model": valid[-1], "auto": 1}
    if parallel_type in named:
        return named[parallel_type], parallel_type == "auto"
    found = re.fullmatch(r"adaptive:(-?[0-9]+)", parallel_type)
    if found is None:
        raise InvalidValueError(f"parallel_type={parallel_type!r} is none of 'adaptive:r', {tuple(named)}")
    return valid_degree(min(max(int(found[1]), 0), valid[-1]), valid), False


def valid_degree(degree: int, valid: list[int]) -> int:
    if degree not in valid:
        raise InvalidValueError(f"adaptive_r={degree!r} is none of valid_rs={valid}")
    return int(degree)


def at_least_1(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidValueError(f"{name}={value!r} must be an int of at least 1")
    return value
