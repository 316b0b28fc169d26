"""activation: act(gate) * up in one pass, the middle of a gated feed-forward network."""

from __future__ import annotations

from typing import Literal

import torch

from tutelx.errors import InvalidValueError
from tutelx.ops._checks import check_floating, check_same
from tutelx.ops._library import calls, kernels

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu", "gelu_tanh", "relu")


def activation(gate: torch.Tensor, up: torch.Tensor | None = None, *, kind: Activation = "silu") -> torch.Tensor:
    """act(gate) * up, or act(gate) if `up` is None, computed in float32 (float64 for float64) and rounded once.

    Args:
        gate, up: equal shapes and dtypes: float32, float64, bfloat16 or float16.
        kind: silu, gelu (erf), gelu_tanh or relu.
    """
    if torch.compiler.is_compiling():
        _check(gate, up, kind)
        return kernels.activation(gate, up, kind)
    try:
        return calls.activation(gate, up, kind)
    except (TypeError, ValueError):
        _check(gate, up, kind)  # as in encode
        raise


def _check(gate: torch.Tensor, up: torch.Tensor | None, kind: str) -> None:
    check_floating(gate, "gate")
    check_activation(kind)
    if up is not None:
        check_same(tuple(up.shape), "up.shape", tuple(gate.shape), "gate.shape")
        check_same(up.dtype, "up.dtype", gate.dtype, "gate.dtype")


def check_activation(kind: str) -> None:
    if kind not in ACTIVATIONS:
        raise InvalidValueError(f"activation={kind!r} is none of {', '.join(ACTIVATIONS)}")


@torch.library.register_fake("tutelx::activation")
def _(gate, up, kind):
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


@torch.library.register_fake("tutelx::activation_backward")
def _(grad, gate, up, kind):
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape if up is not None else (0,))
