"""Copies of a row's inputs, enough of them that no call finds its own in the cache."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from typing import Any

import torch

CACHE_MULTIPLE = 4
MEMORY_SHARE = 0.25  # of the memory available when the row starts; inputs and copy sources may each take this much
MOST_COPIES = 256  # a row of a few kilobytes would need a million: its overhead is what such a row measures


@dataclass(frozen=True, kw_only=True)
class WorkingSet:
    """Sizes in bytes. limited_by: "memory" or "copies" where the copies stay below what was wanted."""

    copies: int
    bytes: int
    wanted: int
    limited_by: str | None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def plan(bytes_each: int, *, cache: int, memory: int) -> WorkingSet:
    """At least CACHE_MULTIPLE times the cache, within MEMORY_SHARE of the memory."""
    each, wanted = max(1, bytes_each), CACHE_MULTIPLE * cache
    copies = math.ceil(wanted / each)
    limits = {"memory": max(1, int(MEMORY_SHARE * memory / each)), "copies": MOST_COPIES}
    name = min(limits, key=lambda name: limits[name])
    limited_by = name if limits[name] < copies else None
    copies = min(copies, limits[name])
    return WorkingSet(copies=copies, bytes=copies * each, wanted=wanted, limited_by=limited_by)


def rotate(inputs: Any, copies: int) -> list[Any]:
    """`inputs` and its copies: equal numbers in different memory."""
    return [inputs, *(copy.deepcopy(inputs) for _ in range(copies - 1))]


def size_of(inputs: Any) -> int:
    """Bytes of all tensors in there."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors(inputs))


def tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, torch.nn.Module):
        yield from value.parameters()
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))
    elif isinstance(value, (tuple, list)):
        for entry in value:
            yield from tensors(entry)
    elif hasattr(value, "__dict__"):
        yield from tensors(vars(value))


def copy_pairs(must_move: int, device: torch.device, *, cache: int, memory: int) -> list[tuple[torch.Tensor, ...]]:
    """What the copy yardstick copies, (from, to): half of `must_move` bytes, read once and written once.

    Both sides exist before the clock starts: no page is touched for the first time, as it is in a result that was
    just allocated. That makes it the stricter yardstick.
    """
    elements = max(1, math.ceil(must_move / 2 / 4))
    copies = plan(8 * elements, cache=cache, memory=memory).copies
    # Written, so that every page exists: a page that was never touched reads from one page of zeros.
    return [tuple(torch.ones(elements, dtype=torch.float32, device=device) for _ in range(2)) for _ in range(copies)]


def copy_once(pair: tuple[torch.Tensor, ...]) -> torch.Tensor:
    source, destination = pair
    return destination.copy_(source)


def read_sources(nbytes: int, device: torch.device, *, cache: int, memory: int) -> list[torch.Tensor]:
    """What the read yardstick takes the largest element of: `nbytes` in one piece, which is torch's quickest read."""
    elements = max(1, math.ceil(nbytes / 4))
    copies = plan(4 * elements, cache=cache, memory=memory).copies
    return [torch.ones(elements, dtype=torch.float32, device=device) for _ in range(copies)]


def to_device(inputs: Any, device: torch.device) -> Any:
    """Moves all tensors in there; leaves stay leaves."""
    return inputs if device.type == "cpu" else _moved(inputs, device)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.nn.Module):
        return value.to(device)
    if isinstance(value, torch.Tensor):
        return value.detach().to(device).requires_grad_(value.requires_grad)
    if isinstance(value, dict):
        return {key: _moved(entry, device) for key, entry in value.items()}
    if isinstance(value, (tuple, list)):
        parts = [_moved(entry, device) for entry in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _moved(getattr(value, f.name), device) for f in fields(value)})
    return value
