"""Which of the built-in activations a script's function is, if that is certain."""

from __future__ import annotations

from collections.abc import Callable
from types import CodeType
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from tutelx.ops.activation import Activation

_FUNCTIONS: dict[Any, Activation] = {
    F.relu: "relu",
    torch.relu: "relu",
    F.silu: "silu",
    F.gelu: "gelu",
}
# The code of functions that do nothing but call one other on their argument; only the names differ.
_CALLS: tuple[CodeType, ...] = (
    (lambda x: f(x)).__code__,  # type: ignore[name-defined]  # noqa: F821
    (lambda x: a.f(x)).__code__,  # type: ignore[name-defined]  # noqa: F821
    (lambda x: a.b.f(x)).__code__,  # type: ignore[name-defined]  # noqa: F821
    (lambda x: a.b.c.f(x)).__code__,  # type: ignore[name-defined]  # noqa: F821
)


def known_activation(function: object) -> Activation | None:
    """relu, silu or gelu: the function itself, its module, or a lambda that only calls it; None for anything else."""
    if type(function) is nn.ReLU:
        return "relu"
    if type(function) is nn.SiLU:
        return "silu"
    if type(function) is nn.GELU:
        return "gelu_tanh" if function.approximate == "tanh" else "gelu"
    called = _only_calls(function) if callable(function) and hasattr(function, "__code__") else function
    try:
        return _FUNCTIONS.get(called)
    except TypeError:  # it has no hash
        return None


def _only_calls(function: Callable) -> object:
    """What `lambda x: name.of.it(x)` calls; the function itself if it does anything else."""
    code: CodeType = function.__code__  # type: ignore[attr-defined]
    if code.co_argcount != 1 or code.co_kwonlyargcount or code.co_freevars:
        return function
    for template in _CALLS:
        if code.co_code == template.co_code and len(code.co_names) == len(template.co_names):
            first, *rest = code.co_names
            found = function.__globals__.get(first)  # type: ignore[attr-defined]
            for name in rest:
                found = getattr(found, name, None)
            return found
    return function
