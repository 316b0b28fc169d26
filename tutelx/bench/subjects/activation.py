"""activation and its backward: silu(gate) * up on the rows of all experts. R rows, H hidden dim."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional as F

from tutelx import ops
from tutelx.bench import limits
from tutelx.bench.shapes import Shape
from tutelx.bench.subject import Subject, Tensors, Way
from tutelx.ops import reference
from tutelx.ops._library import calls
from tutelx.testing import cases


class ActivationInputs(NamedTuple):
    gate_RH: torch.Tensor
    up_RH: torch.Tensor


class ActivationBackwardInputs(NamedTuple):
    grad_RH: torch.Tensor
    gate_RH: torch.Tensor
    up_RH: torch.Tensor


def _make(shape: Shape, dtype: torch.dtype) -> ActivationInputs:
    return ActivationInputs(*(cases.tensor(shape.rows, shape.H, dtype=dtype, seed=seed) for seed in (1, 2)))


def _make_backward(shape: Shape, dtype: torch.dtype) -> ActivationBackwardInputs:
    return ActivationBackwardInputs(*(cases.tensor(shape.rows, shape.H, dtype=dtype, seed=seed) for seed in (1, 2, 3)))


def _backward_in_torch(inputs: ActivationBackwardInputs) -> Tensors:
    grad, gate, up = inputs
    return torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)


SUBJECTS = (
    Subject(
        op="activation",
        make=_make,
        ours=lambda inputs: ops.activation(*inputs),
        plain=(Way(name="silu * up", call=lambda inputs: F.silu(inputs.gate_RH) * inputs.up_RH),),
        reference=lambda inputs: reference.activation(*inputs),
        must_move=limits.activation,
    ),
    Subject(
        op="activation_backward",
        make=_make_backward,
        ours=lambda inputs: calls.activation_backward(*inputs, "silu"),
        plain=(Way(name="silu_backward", call=_backward_in_torch),),
        must_move=limits.activation_backward,
        gradients=True,
    ),
)
