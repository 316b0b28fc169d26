"""Are two layers the same? Relative errors, and the tolerances they are held to."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import nn

from tutelx.integrations.sandbox import Values, substituted

# Relative to the largest value of each tensor. In low precision a gradient is a long sum of rounded products.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
GRADIENT_TOLERANCE = {**TOLERANCE, torch.float16: 3e-2, torch.bfloat16: 1e-1}
# Gradients that cancel to nothing are noise: they count relative to this share of the largest gradient.
_NOISE_FLOOR = 1e-2
# Of the gradients that exist at one time while layers are compared.
_LEAST_GRADIENT_BYTES, _GRADIENT_SHARE = 2**20, 16
_PIECE = 2**26  # elements compared at a time

Gradients = Mapping[str, "torch.Tensor | None"]


def relative_error(given: torch.Tensor, expected: torch.Tensor, *, floor: float = 0.0) -> float:
    """max |given - expected| / max(max |expected|, floor); inf for different shapes or where it is not a number."""
    if given.shape != expected.shape:
        return float("inf")
    if not expected.numel():
        return 0.0
    # Piece by piece: in double precision a large tensor is four times the size that was made for it.
    pieces = [each.detach().reshape(-1).split(_PIECE) for each in (given, expected)]
    differences, sizes = [], []
    for one, other in zip(*pieces):
        wide = other.double()
        differences.append((one.double() - wide).abs().max())
        sizes.append(wide.abs().max())
    difference, size = (float(torch.stack(each).max()) for each in (differences, sizes))
    scale = max(size, floor)
    if difference == 0.0:
        return 0.0
    error = difference / scale if scale > 0 else float("inf")
    return error if error == error else float("inf")


def gradients(
    module: nn.Module, x: torch.Tensor, names: Iterable[str], values: Values | None = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    """The output for `x`, and the gradients of a fixed random sum of it in the input (called "") and named parameters.

    The parameters' own `.grad`, hooks and `requires_grad` play no part: aliases stand in for them, or for `values`.
    """
    own = dict(module.named_parameters())
    aliases = {parameter: (parameter if values is None else values[parameter]).detach() for parameter in own.values()}
    wanted = {name: aliases[own[name]].requires_grad_() for name in names}
    leaf = x.detach().clone().requires_grad_()
    # A product with one keeps the leaf out of reach of a forward that changes its input in place.
    with substituted(module, aliases):
        y = module(leaf * 1)
    y = y[0] if isinstance(y, tuple) else y
    weigh = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    if not y.requires_grad:
        return y, dict.fromkeys(["", *wanted])
    grads = torch.autograd.grad((y * weigh).sum(), [leaf, *wanted.values()], allow_unused=True)
    return y.detach(), dict(zip(["", *wanted], grads))


def within(layer: nn.Module, names: Sequence[str]) -> list[str]:
    """The first of the named parameters whose gradients together are small beside the layer; one at least."""
    sizes = {name: parameter.numel() * parameter.element_size() for name, parameter in layer.named_parameters()}
    most = max(_LEAST_GRADIENT_BYTES, sum(sizes.values()) // _GRADIENT_SHARE)
    sums = itertools.accumulate(sizes[name] for name in names)
    return [name for name, total in zip(names, sums) if total <= most] or list(names[:1])


def largest_error(given: Gradients, expected: Gradients, vanishing: Collection[str] = ()) -> tuple[float, str]:
    """Over all gradients, and where; a gradient that only one side has counts as inf.

    vanishing: names of gradients that are zero on paper, so that rounding is all there is to them.
    """
    sizes = (float(g.abs().max()) for g in expected.values() if g is not None and g.numel())
    largest = max(sizes, default=0.0)
    worst = (0.0, "")
    for name, theirs in expected.items():
        ours = given[name]
        if theirs is None or ours is None:
            error = 0.0 if theirs is ours else float("inf")
        else:
            error = relative_error(ours, theirs, floor=largest if name in vanishing else _NOISE_FLOOR * largest)
        worst = max(worst, (error, name))
    return worst
