"""Does the replacement compute what the library's layer does? Both are run on the same tokens with the same noise."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map_only

from tutelx.integrations.parity import TOLERANCE, Gradients, largest_error, relative_error, within
from tutelx.integrations.sandbox import Sandbox, substituted
from tutelx.integrations.spec import Declined

if TYPE_CHECKING:
    from tutelx.integrations.libraries.replacement import LibraryMoE

_SEED = 7
# Gradients are compared for their structure (what is detached, what is missing), so rounding gets room.
_GRADIENT_SLACK = 100.0
_MOST_GRADIENT_ERROR = 0.3

Outcome = tuple[Any, list[Any], Gradients, torch.Tensor]


def mismatch(original: nn.Module, wrapped: LibraryMoE, *, rows: int = 32, every: bool = False) -> str | None:
    """Outputs, what the forward leaves behind, gradients and random state, in both modes; None if all agree.

    rows: the least tokens of each example.
    every: compare the gradients of all parameters, not only of as many as are small beside the layer.

    Raises:
        Declined: running the layer writes to its parameters.
    """
    names = [name for name, _ in original.named_parameters()] if every else _light(original)
    dtype = next(original.parameters()).dtype
    with Sandbox(original), torch.enable_grad():
        for mode in (False, True):
            original.train(mode)
            wrapped.training = mode
            for example in wrapped.examples(rows):
                theirs = _outcome(original, wrapped, example, names)
                reason = _difference(_outcome(wrapped, wrapped, example, names), theirs, TOLERANCE[dtype])
                if reason is not None:
                    return f"{reason} in {'train' if mode else 'eval'} mode"
    return None


def keeps_dtype(original: nn.Module, wrapped: LibraryMoE) -> bool:
    """Under autocast, is the first output of the input's dtype?"""
    example = wrapped.examples()[0]
    if example[0].dtype != torch.float32:
        return False
    try:
        with Sandbox(original), torch.no_grad(), torch.autocast(example[0].device.type, torch.bfloat16):
            values, _ = tree_flatten(original.eval()(*example))
    except Exception:  # the layer does not run under autocast at all: there is nothing to agree with
        return False
    return values[0].dtype == torch.float32


def _light(layer: nn.Module) -> list[str]:
    """Names of parameters, the smallest first, whose gradients are small beside the layer."""
    return within(layer, [name for name, _ in sorted(layer.named_parameters(), key=lambda named: named[1].numel())])


def _outcome(module: nn.Module, wrapped: LibraryMoE, example: tuple, names: list[str]) -> Outcome:
    """What is returned; it and what is left behind as a list; gradients; the random state afterwards."""
    own = dict(module.named_parameters())
    light = _light(module)
    # Copies of the small ones, so that a forward that writes to them is found out before it does harm.
    aliases = {p: p.detach().clone() if name in light else p.detach() for name, p in own.items()}
    versions = {parameter: alias._version for parameter, alias in aliases.items()}
    leaves = {name: aliases[own[name]].requires_grad_() for name in names}

    def leaf(x: torch.Tensor) -> torch.Tensor:
        if not x.is_floating_point():
            return x
        leaves[f"input {len(leaves)}"] = x = x.detach().clone().requires_grad_()
        return x * 1  # out of reach of a forward that changes its input in place

    arguments = tree_map_only(torch.Tensor, leaf, example)
    torch.manual_seed(_SEED)
    with substituted(module, aliases), wrapped.observed() as filed:
        result = module(*arguments)
        values, structure = tree_flatten([result, [getattr(module, name) for name in wrapped.leaves], filed])
    written = [name for name, parameter in own.items() if aliases[parameter]._version != versions[parameter]]
    if written:
        raise Declined(written[0], "is written to by the forward")
    state = torch.get_rng_state()
    weigh = torch.Generator().manual_seed(1)
    objective = [
        (value * torch.randn(value.shape, generator=weigh).to(value)).sum()
        for value in values
        if isinstance(value, torch.Tensor) and value.requires_grad
    ]
    grads: list[torch.Tensor | None] = [None] * len(leaves)
    if objective:
        total = torch.stack([each.double() for each in objective]).sum()
        grads = list(torch.autograd.grad(total, list(leaves.values()), allow_unused=True))
    return structure, values, dict(zip(leaves, grads)), state


def _difference(given: Outcome, expected: Outcome, tolerance: float) -> str | None:
    if given[0] != expected[0]:
        return f"returns {given[0]}, and not {expected[0]}"
    for place, (ours, theirs) in enumerate(zip(given[1], expected[1])):
        if not isinstance(theirs, torch.Tensor):
            continue
        if not torch.isfinite(theirs).all():
            return "gives values that are not finite for random tokens, so that nothing can be compared"
        if not isinstance(ours, torch.Tensor) or (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
            return f"gives another shape or dtype (value {place})"
        if (error := relative_error(ours, theirs)) > tolerance:
            return f"computes something else: relative error {error:.1e} of value {place}"
    error, where = largest_error(given[2], expected[2])
    if error > min(_GRADIENT_SLACK * tolerance, _MOST_GRADIENT_ERROR):
        return f"has another gradient of {where}: relative error {error:.1e}"
    if not torch.equal(given[3], expected[3]):
        return "draws other random numbers"
    return None
