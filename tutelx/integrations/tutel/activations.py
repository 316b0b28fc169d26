"""Which of the built-in activations a script's function is, if that is certain."""

from __future__ import annotations

import dis
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
# What else stands in the code of a call, by Python version.
_SILENT = ("RESUME", "PRECALL", "PUSH_NULL", "CACHE", "NOP")
_LOAD_ATTRIBUTE = ("LOAD_ATTR", "LOAD_METHOD")
_LOAD_ARGUMENT = ("LOAD_FAST", "LOAD_FAST_BORROW")
_CALL = ("CALL", "CALL_FUNCTION", "CALL_METHOD")


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
    if code.co_argcount != 1 or code.co_kwonlyargcount:
        return function
    steps = [each for each in dis.get_instructions(code) if each.opname not in _SILENT]
    if len(steps) < 4 or steps[0].opname != "LOAD_GLOBAL":
        return function
    *attributes, argument, call, end = steps[1:]
    if (
        any(each.opname not in _LOAD_ATTRIBUTE for each in attributes)
        or argument.opname not in _LOAD_ARGUMENT
        or (call.opname, call.arg) not in [(name, 1) for name in _CALL]
        or end.opname != "RETURN_VALUE"
    ):
        return function
    found = function.__globals__.get(steps[0].argval)  # type: ignore[attr-defined]
    for each in attributes:
        found = getattr(found, each.argval, None)
    return found
