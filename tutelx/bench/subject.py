"""What a benchmark of one op consists of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from tutelx.bench import rotation
from tutelx.bench.shapes import Shape

Inputs = TypeVar("Inputs")
Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class Way(Generic[Inputs]):
    """One way to compute an op.

    prepare: makes this way's own inputs out of the subject's, untimed (weights in another layout, say).
    finish: brings its output into the subject's form for the comparison, untimed; given its own inputs and the output.
    unfit: why this way is left out at a shape; None where it takes part.
    """

    name: str
    call: Callable[[Any], Any]
    prepare: Callable[[Inputs], Any] | None = None
    finish: Callable[[Any, Any], Any] = lambda inputs, output: output
    unfit: Callable[[Shape], str | None] = lambda shape: None


@dataclass(frozen=True, kw_only=True)
class Subject(Generic[Inputs]):
    """One op.

    make: one set of inputs, seeded.
    rotate: that set and others, as many as asked for: equal work in different memory. Default: deep copies.
    ours: the compiled op. plain: the same in plain torch, in several ways. reference: `tutelx.ops.reference`, which is
        a Python loop: only at small sizes.
    gemms: the matrix products that the op cannot avoid, as its yardstick.
    reads: the tensors that it cannot avoid reading; its yardstick is one read of as many bytes. With neither: a copy of
        `must_move` bytes.
    must_move, flops: of one call; see `limits`.
    compared: what of an output is compared; ways may differ in the rest (the order among equal scores).
    gradients: some of the outputs are, and take the wider tolerance.
    """

    op: str
    make: Callable[[Shape, torch.dtype], Inputs]
    ours: Callable[[Inputs], Any]
    plain: tuple[Way[Inputs], ...]
    must_move: Callable[[Shape, int], int]
    rotate: Callable[[Inputs, int], list[Inputs]] = rotation.rotate
    reference: Callable[[Inputs], Any] | None = None
    gemms: Callable[[Inputs], Any] | None = None
    reads: Callable[[Inputs], Tensors] | None = None
    flops: Callable[[Shape], int] | None = None
    compared: Callable[[Inputs, Any], Tensors] = lambda inputs, output: as_tuple(output)
    gradients: bool = False


def as_tuple(output: Any) -> Tensors:
    return tuple(output) if isinstance(output, (tuple, list)) else (output,)


LARGEST_ONE_HOT = 2**22


def one_hot_unfit(shape: Shape) -> str | None:
    """A one-hot mask [R, T] of the whole batch grows with the square of T."""
    elements = shape.rows * shape.T
    if elements <= LARGEST_ONE_HOT:
        return None
    return f"a one-hot mask of {elements:.1e} elements exceeds {LARGEST_ONE_HOT:.1e}"
