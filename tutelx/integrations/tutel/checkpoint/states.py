"""State dicts of one rank, and of all of them.

A layer's keys are `PREFIX._num_global_experts` and, of its experts, `PREFIX.experts.*`; everything else is the same on
all ranks.
"""

from __future__ import annotations

import logging
from collections.abc import MutableMapping, Sequence
from typing import Any

import torch

from tutelx.errors import InvalidValueError
from tutelx.integrations.tutel.checkpoint import layout

log = logging.getLogger("tutelx")

COUNT, EXPERTS = "_num_global_experts", "experts."

State = MutableMapping[str, Any]


def gather_states(states: Sequence[State], default_num_experts: int = 0) -> State:
    """Makes the first state one of all experts, and returns it.

    Args:
        states: of all ranks, in their order.
        default_num_experts: of each layer in checkpoints of early versions, which do not say it.

    Raises:
        InvalidValueError: no layer is found, ranks hold different names or shapes, or experts and ranks do not divide.
        InvalidTypeError: an expert's value is no tensor.
    """
    first = states[0]
    counts, recorded = num_experts(first), True
    if not counts:
        recorded = False
        counts = dict.fromkeys(_early_prefixes(first), default_num_experts)
        if not counts or default_num_experts < 1:
            raise InvalidValueError(
                "there is no key '_num_global_experts', so this is no checkpoint of an MoE layer, or one of an early"
                " version: give its number of experts with --default_num_global_experts"
            )
        for prefix in counts:
            first[prefix + COUNT] = torch.tensor(default_num_experts)
    owned = owner_of(first, counts)
    for rank, state in enumerate(states):
        there = {key for key in state if key in owned or _is_owned(key, counts)}
        if odd := sorted(there ^ owned.keys()):
            raise InvalidValueError(f"rank 0 and rank {rank} do not hold the same experts' tensors: {odd[0]!r}")
        shared = [key for key in first if key not in owned and key in state]
        different = [key for key in shared if not _same(first[key], state[key])]
        if different:
            log.warning("rank %d has another %s than rank 0, whose value is kept", rank, ", ".join(different))
    slices = {prefix: layout.slices_of(count, len(states)) for prefix, count in counts.items()}
    tensors = {key: first[key] for key in owned if isinstance(first[key], torch.Tensor)}
    # Without a count in the file such a shape rather tells that the one given is wrong.
    squeezed = {owned[key] for key, t in tensors.items() if recorded and layout.is_squeezed(t, slices[owned[key]])}
    for key, prefix in owned.items():
        parts = [state[key] for state in states]
        first[key] = layout.join(key, parts, counts[prefix], squeezed=prefix in squeezed)
    for key in owned:
        first[key] = layout.without_padding(first, key)
    return first


def scatter_state(state: State, world: int) -> list[dict[str, torch.Tensor]]:
    """What differs from rank to rank: the experts' tensors of each of `world` ranks, by their keys.

    Raises:
        InvalidValueError: no layer is found, or its experts do not divide among the ranks.
        InvalidTypeError: an expert's value is no tensor.
    """
    counts = num_experts(state)
    if not counts:
        raise InvalidValueError(
            "there is no key '_num_global_experts', so this is no checkpoint of an MoE layer, or one of an early"
            " version: load it in the program that made it, and save it again"
        )
    ranks: list[dict[str, torch.Tensor]] = [{} for _ in range(world)]
    for key, prefix in owner_of(state, counts).items():
        for rank, part in zip(ranks, layout.split(key, state[key], counts[prefix], world)):
            rank[key] = part
    return ranks


def num_experts(state: State) -> dict[str, int]:
    """The number of experts of each layer, by its prefix, which ends with a dot unless it is empty."""
    found = [key for key in state if key == COUNT or key.endswith(f".{COUNT}")]
    return {key.removesuffix(COUNT): int(state[key]) for key in found}


def owner_of(state: State, counts: dict[str, int]) -> dict[str, str]:
    """The experts' keys, and the prefix of the layer that each belongs to."""
    found = {}
    for key in state:
        prefixes = [prefix for prefix in counts if key.startswith(prefix + EXPERTS)]
        if prefixes:
            found[key] = max(prefixes, key=len)
    return found


def _is_owned(key: str, counts: dict[str, int]) -> bool:
    return any(key.startswith(prefix + EXPERTS) for prefix in counts)


def _early_prefixes(state: State) -> list[str]:
    found = [key for key in state if key.startswith(EXPERTS) or f".{EXPERTS}" in key]
    return list(dict.fromkeys(key[: key.rindex(EXPERTS)] for key in found))


def _same(one: Any, other: Any) -> bool:
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return True  # what is no tensor is not the model
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8))
