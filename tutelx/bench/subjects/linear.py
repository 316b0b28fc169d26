"""linear: a router's product. T tokens of D numbers, E experts."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional as F

from tutelx import ops
from tutelx.bench import limits
from tutelx.bench.shapes import Shape
from tutelx.bench.subject import Subject, Way
from tutelx.testing import cases


class LinearInputs(NamedTuple):
    x_TD: torch.Tensor
    weight_ED: torch.Tensor


def _make(shape: Shape, dtype: torch.dtype) -> LinearInputs:
    weight_ED = cases.tensor(shape.E, shape.D, dtype=dtype, seed=1) * shape.D**-0.5
    return LinearInputs(cases.tensor(shape.T, shape.D, dtype=dtype), weight_ED)


SUBJECTS = (
    Subject(
        op="linear",
        make=_make,
        ours=lambda inputs: ops.linear(*inputs),
        plain=(Way(name="linear", call=lambda inputs: F.linear(*inputs)),),
        must_move=limits.linear,
        flops=limits.linear_flops,
    ),
)
