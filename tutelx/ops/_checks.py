"""Checks at the door that several ops share."""

from __future__ import annotations

import torch

from tutelx.errors import InvalidTypeError, InvalidValueError

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_tensor(value: object, name: str, *, dim: int) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise InvalidTypeError(f"{name} is {type(value).__name__}, expected torch.Tensor")
    if value.dim() != dim:
        raise InvalidValueError(f"{name} has {value.dim()} dimensions {tuple(value.shape)}, expected {dim}")
    return value


def check_floating(value: torch.Tensor, name: str) -> None:
    if value.dtype not in FLOATING:
        raise InvalidTypeError(f"{name} is {value.dtype}, expected one of {', '.join(map(str, FLOATING))}")


def check_int(value: object, name: str, *, at_least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise InvalidTypeError(f"{name}={value!r} is {type(value).__name__}, expected int")
    if value < at_least:
        raise InvalidValueError(f"{name}={value} must be at least {at_least}")
    return value  # type: ignore[return-value]


def check_same(given: object, given_name: str, expected: object, expected_name: str) -> None:
    if given != expected:
        raise InvalidValueError(f"{given_name}={given} differs from {expected_name}={expected}")


def wants_gradient(*tensors: torch.Tensor) -> bool:
    """Whether the graph of one of them is being recorded."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
