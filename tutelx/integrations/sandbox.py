"""Running somebody's layer without leaving a trace in it."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

# What torch itself keeps in a module, and the mode, which the probe switches.
_NOT_COMPARED = {*vars(nn.Module()), "training"}

Values = Mapping[nn.Parameter, torch.Tensor]


@contextmanager
def substituted(module: nn.Module, values: Values) -> Iterator[None]:
    """The module's parameters are those of `values` for a while.

    `torch.func.functional_call` does not put back the parameters of a submodule that is held twice (torch 2.13).
    """
    places = [
        (child._parameters, name, parameter)
        for child in module.modules()
        for name, parameter in child._parameters.items()
        if parameter is not None and parameter in values
    ]
    try:
        for held, name, parameter in places:
            held[name] = values[parameter]  # type: ignore[assignment]
        yield
    finally:
        for held, name, parameter in places:
            held[name] = parameter


class Sandbox:
    """Puts back the attributes, modes and random state that running `layer` changes, and tells which those were.

    Inside, autocast is off, and tensors are ordinary ones even in a caller's inference mode.
    """

    def __init__(self, layer: nn.Module) -> None:
        self._names = {module: name for name, module in layer.named_modules()}
        self._layer = layer
        self._stack = ExitStack()

    def __enter__(self) -> Sandbox:
        self._state = {module: dict(vars(module)) for module in self._names}
        self._contents = {
            id(value): (value, _content(value))
            for state in self._state.values()
            for name, value in state.items()
            if name not in _NOT_COMPARED
        }
        self._versions = {
            name: (tensor, tensor._version)
            for name, tensor in self._layer.named_parameters()
            if not tensor.is_inference()
        }
        devices = {p.device for p in self._layer.parameters() if p.device.type == "cuda"}
        self._random = random.getstate()
        contexts: list[AbstractContextManager] = [
            torch.inference_mode(False),
            torch.random.fork_rng(devices=list(devices)),
            *(torch.autocast(kind, enabled=False) for kind in {"cpu", *(d.type for d in devices)}),
        ]
        for context in contexts:
            self._stack.enter_context(context)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        random.setstate(self._random)
        for module, state in self._state.items():
            now = vars(module)
            for name in [name for name in now if name not in state]:
                del now[name]
            for name, value in state.items():
                if now.get(name) is not value:
                    now[name] = value
        for value, content in self._contents.values():
            if not _unchanged(value, content):
                _restore(value, content)

    def changed(self) -> list[str]:
        """Paths of what differs from before: attributes set or changed, parameters written to."""
        paths = []
        for module, state in self._state.items():
            now = vars(module)
            for name in {**state, **now}:
                if name in _NOT_COMPARED:
                    continue
                same = name in state and name in now and now[name] is state[name]
                if not same or not _unchanged(state[name], self._contents[id(state[name])][1]):
                    paths.append(".".join(filter(None, (self._names[module], name))))
        return paths + [name for name, (tensor, version) in self._versions.items() if tensor._version != version]


def _content(value: Any) -> Any:
    """Enough to see, and to undo, a change of the object itself; None for what cannot change."""
    if isinstance(value, torch.Tensor):
        return None if value.is_inference() else (value._version, value.detach().clone())
    if isinstance(value, (list, dict, set)):
        return value.copy()
    return None


def _unchanged(value: Any, content: Any) -> bool:
    if content is None:
        return True
    if isinstance(value, torch.Tensor):
        return value._version == content[0]
    if isinstance(value, list):
        return len(value) == len(content) and all(a is b for a, b in zip(value, content))
    if isinstance(value, dict):
        return list(value) == list(content) and all(value[key] is content[key] for key in value)
    return value == content


def _restore(value: Any, content: Any) -> None:
    if isinstance(value, torch.Tensor):
        with torch.no_grad():
            value.copy_(content[1])
    elif isinstance(value, list):
        value[:] = content
    else:
        value.clear()
        value.update(content)
