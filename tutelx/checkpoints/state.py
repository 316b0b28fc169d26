"""A state: dictionaries, lists and tuples of tensors and plain values, as a checkpoint holds them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from tutelx.errors import InvalidTypeError, InvalidValueError

State = dict[str, Any]
PLAIN = (str, bytes, bool, int, float, complex, type(None), torch.dtype, torch.Size, torch.device)


def checked(value: Any, path: str = "") -> Any:
    """The same with plain tensors, detached and on the CPU.

    Raises:
        InvalidTypeError: a key is no string, a value is none that a checkpoint can hold; the message says where.
    """
    if isinstance(value, torch.Tensor):
        if type(value) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer) or value.layout != torch.strided:
            kind = f"{type(value).__name__} of layout {value.layout}"
            raise InvalidTypeError(f"{path} is a {kind}, expected a plain tensor; gather it before you save it")
        return value.detach().cpu()
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise InvalidTypeError(
                    f"{path or 'the state'} has the key {key!r}, expected a str; of an optimizer that is"
                    " tutelx.parallel.optimizer_state_dict, whose keys are names"
                )
        return {key: checked(each, f"{path}.{key}" if path else key) for key, each in value.items()}
    if isinstance(value, list):
        return [checked(each, f"{path}.{index}") for index, each in enumerate(value)]
    if type(value) is tuple:
        return tuple(checked(each, f"{path}.{index}") for index, each in enumerate(value))
    if not isinstance(value, PLAIN):
        raise InvalidTypeError(f"{path} is a {type(value).__name__}, expected tensors and plain values")
    return value


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """All that is no container, and empty containers, with their dotted paths."""
    if isinstance(value, dict) and value:
        for key, each in value.items():
            yield from leaves(each, f"{path}.{key}" if path else key)
    elif isinstance(value, (list, tuple)) and value and type(value) in (list, tuple):
        for index, each in enumerate(value):
            yield from leaves(each, f"{path}.{index}")
    else:
        yield path, value


def part(state: State, path: str) -> State:
    """What lies under a dotted path.

    Raises:
        InvalidValueError: there is nothing, or no dictionary; the message lists what there is.
    """
    found: Any = state
    done: list[str] = []
    for key in path.split("."):
        if not isinstance(found, dict) or key not in found:
            there = ", ".join(found) if isinstance(found, dict) else f"a {type(found).__name__}"
            raise InvalidValueError(f"part={path!r}: {'.'.join(done) or 'the checkpoint'} holds {there}, not {key!r}")
        found = found[key]
        done.append(key)
    if not isinstance(found, dict):
        raise InvalidValueError(f"part={path!r} is a {type(found).__name__}, expected a dictionary")
    return found
