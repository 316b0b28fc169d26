"""Do the two models agree before any training? One batch: logits, and the gradient of every parameter."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

import tutelx
from tutelx.demo.model import LanguageModel

# Relative: the largest difference of a tensor over its largest magnitude. bfloat16 is shown and not judged: a
# rounding may move a token to another expert there, in one layer after the other.
TOLERANCES = {"float64": 1e-10, "float32": 1e-5, "bfloat16": None}
MAX_SEQUENCES = 4


@dataclass(frozen=True, kw_only=True)
class Parity:
    """What one comparison found; `worst_gradient_name` is the parameter that `worst_gradient` belongs to."""

    dtype: str
    tokens: int
    tolerance: float | None
    logits: float
    worst_gradient: float
    worst_gradient_name: str
    gradients: int

    @property
    def passed(self) -> bool:
        return self.tolerance is None or max(self.logits, self.worst_gradient) <= self.tolerance

    def failure(self) -> str:
        return (
            f"{self.dtype} differs by more than {self.tolerance:.0e}: logits by {self.logits:.1e},"
            f" the gradient of {self.worst_gradient_name} by {self.worst_gradient:.1e}"
        )


def compare(model: LanguageModel, dtype: str, batch: tuple[torch.Tensor, torch.Tensor]) -> Parity:
    """Copies the model, so that its own gradients and weights stay as they are."""
    inputs, targets = (part[:MAX_SEQUENCES] for part in batch)
    as_written = copy.deepcopy(model).to(getattr(torch, dtype))
    wrapped = tutelx.wrap(copy.deepcopy(as_written), strict=True)
    reference_logits, reference = _logits_and_gradients(as_written, inputs, targets)
    logits, gradients = _logits_and_gradients(wrapped, inputs, targets)
    # A gradient that is zero as written (the gate's for one expert a token) has no scale of its own: the largest of
    # all gradients stands in.
    largest = max(gradient.abs().max().item() for gradient in reference.values() if gradient is not None)
    errors = {name: _error(reference[name], gradients.get(name), largest) for name in reference}
    errors.update((name, float("inf")) for name in gradients.keys() - reference.keys())
    worst = max(errors, key=lambda name: errors[name])
    return Parity(
        dtype=dtype,
        tokens=inputs.numel(),
        tolerance=TOLERANCES[dtype],
        logits=_error(reference_logits, logits, 0.0),
        worst_gradient=errors[worst],
        worst_gradient_name=worst,
        gradients=len(errors),
    )


def _logits_and_gradients(
    model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    logits = model(inputs)
    F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    return logits.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def _error(expected: torch.Tensor | None, actual: torch.Tensor | None, scale_of_zero: float) -> float:
    """A gradient that only one of the two has is infinitely wrong: optimizers treat zero and none differently."""
    if expected is None or actual is None:
        return 0.0 if expected is actual else float("inf")
    difference = (expected - actual).abs().max().item()
    scale = expected.abs().max().item() or scale_of_zero
    if difference == 0:
        return 0.0
    # NaN compares false everywhere, so max() over errors could skip it; infinity cannot be skipped.
    return difference / scale if scale > 0 and difference == difference else float("inf")
