"""Which Linear of an expert is which, and the activation between them, found by running it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import get_args

import torch
import torch.nn.functional as F
from torch import nn

from tutelx.experts.linked import ExpertFormula, Path
from tutelx.integrations.parity import TOLERANCE, relative_error
from tutelx.integrations.sandbox import substituted
from tutelx.integrations.spec import Declined
from tutelx.ops.activation import Activation

_TOKENS = 4
_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda value: F.gelu(value, approximate="tanh"),
    "relu": F.relu,
}


def find_formula(expert: nn.Module, model_dim: int, path: str) -> ExpertFormula:
    """The formula that the expert computes, whatever its layers are called.

    Told apart in float64 and with random weights: present weights may be zero, or too small to show an activation.

    Raises:
        Declined: it is no two-layer or gated feed-forward network of the known activations.
    """
    linears = {tuple(name.split(".")): m for name, m in expert.named_modules() if isinstance(m, nn.Linear)}
    if len(linears) not in (2, 3):
        raise Declined(path, f"has {len(linears)} nn.Linear layers, expected 2, or 3 if gated")
    formulas = list(_formulas(expert, linears, model_dim))
    if not formulas:
        shapes = ", ".join(f"{'.'.join(name)}.weight {tuple(m.weight.shape)}" for name, m in linears.items())
        raise Declined(path, f"is no feed-forward network of model_dim={model_dim}: it has {shapes}")
    parameter = next(expert.parameters())
    # An expert that casts to a fixed dtype fails in float64; its own dtype then decides.
    reasons: list[str] = []
    for dtype in dict.fromkeys((torch.float64, parameter.dtype)):
        tolerance = 1e-9 if dtype == torch.float64 else TOLERANCE[dtype]
        try:
            errors = _errors(expert, formulas, model_dim, dtype, parameter.device)
        except Exception as error:
            reasons.append(f"raises {type(error).__name__}: {error}")
            continue
        best = min(errors, key=lambda formula: errors[formula])
        fitting = [formula for formula in formulas if errors[formula] <= max(tolerance, 8 * errors[best])]
        if errors[best] > tolerance:
            reasons.append(f"is not {best} nor another known network: relative error {errors[best]:.1e} in {dtype}")
        elif len(fitting) > 1:
            reasons.append(f"could be {fitting[0]} or {fitting[1]}: {dtype} does not tell them apart")
        else:
            return best
    raise Declined(path, reasons[-1])


def find_activation(function: Callable[[torch.Tensor], torch.Tensor], path: str) -> Activation:
    """Which of the compiled activations the function is, by its values.

    Raises:
        Declined: none of them.
    """
    x = torch.linspace(-4, 4, 65, dtype=torch.float64)
    with torch.no_grad():
        theirs = function(x.clone())
    for kind in get_args(Activation):
        if isinstance(theirs, torch.Tensor) and relative_error(_ACTIVATIONS[kind](x), theirs) <= 1e-9:
            return kind
    raise Declined(path, f"is none of the activations {', '.join(get_args(Activation))}")


def apply_formula(expert: nn.Module, formula: ExpertFormula, x: torch.Tensor) -> torch.Tensor:
    """x [n, M] -> [n, M], in plain torch, with the weights that the expert holds now."""
    weights = dict(expert.named_parameters(remove_duplicate=False))
    return _evaluate(formula, weights, x)


def _formulas(expert: nn.Module, linears: dict[Path, nn.Linear], model_dim: int) -> Iterator[ExpertFormula]:
    """Every assignment of layers to roles that their shapes allow, with every activation."""
    for up, down, *gate in itertools.permutations(linears):
        hidden = linears[up].out_features
        shapes = [(hidden, model_dim), (model_dim, hidden), (hidden, model_dim)]
        if any(tuple(linears[role].weight.shape) != shape for role, shape in zip((up, down, *gate), shapes)):
            continue
        for activation in get_args(Activation):
            yield ExpertFormula(
                kind=type(expert),
                up=up,
                down=down,
                gate=gate[0] if gate else None,
                biased=frozenset(name for name, m in linears.items() if m.bias is not None),
                activation=activation,
                hidden_dim=hidden,
            )


def _errors(
    expert: nn.Module, formulas: list[ExpertFormula], model_dim: int, dtype: torch.dtype, device: torch.device
) -> dict[ExpertFormula, float]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(device, dtype)

    # Pre-activations of about 1.5: there all activations differ.
    values = {
        p: random(*p.shape, scale=1.5 / math.sqrt(p.shape[-1]) if p.dim() == 2 else 0.5) for p in expert.parameters()
    }
    x = random(_TOKENS, model_dim)
    with substituted(expert, values):
        theirs = expert(x.clone())
    if not isinstance(theirs, torch.Tensor):
        raise TypeError(f"an expert returns {type(theirs).__name__}, expected a tensor")
    weights = {name: values[p] for name, p in expert.named_parameters(remove_duplicate=False)}
    return {formula: relative_error(_evaluate(formula, weights, x), theirs) for formula in formulas}


def _evaluate(formula: ExpertFormula, weights: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    def linear(path: Path, value: torch.Tensor) -> torch.Tensor:
        name = ".".join(path)
        return F.linear(value, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    act = _ACTIVATIONS[formula.activation]
    up = linear(formula.up, x)
    hidden = act(up) if formula.gate is None else act(linear(formula.gate, x)) * up
    return linear(formula.down, hidden)
