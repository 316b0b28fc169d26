"""Optimizer states in which what belongs to an expert's parameter has the shape of all experts, as state dicts have."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tutelx.comm.shards import Shard
from tutelx.errors import InvalidValueError
from tutelx.parallel.parameters import own_parameters

State = dict[str, Any]


def optimizer_state_dict(model: nn.Module, optimizer: torch.optim.Optimizer, *, full: bool = False) -> State:
    """As `torch.distributed.checkpoint.state_dict.get_optimizer_state_dict`, for any number of ranks to load.

    Keys are parameters' names. An optimizer that has not stepped yet gets its state first, so that there is something
    to load into: `torch.distributed.checkpoint.load` fills it in place, then comes :func:`load_optimizer_state_dict`.
    All ranks must call.

    Args:
        full: gather everything, as plain tensors on the CPU.

    Raises:
        InvalidValueError: a state of an expert's parameter has another shape than the parameter (and is no scalar), so
            that nobody knows how it is spread.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
    from torch.distributed.tensor import DTensor

    found: State = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=False))
    shards = _by_name(model)
    # The dictionaries inside are the optimizer's own.
    found["state"] = {name: dict(state) for name, state in found["state"].items()}
    for name, state in found["state"].items():
        for key, value in state.items():
            if name in shards and isinstance(value, torch.Tensor) and value.dim() > 0:
                state[key] = value = _whole(shards[name], value, f"{name}: {key}")
            if full and isinstance(value, DTensor):
                state[key] = value = value.full_tensor()
            if full and isinstance(value, torch.Tensor):
                state[key] = value.cpu()
    return found


def load_optimizer_state_dict(model: nn.Module, optimizer: torch.optim.Optimizer, state: State) -> None:
    """Loads what :func:`optimizer_state_dict` gave, on any number of ranks; this rank keeps its part.

    `state` is not changed; whole tensors may be plain or distributed in any way. All ranks must call.

    Raises:
        InvalidValueError: a state of an expert's parameter has another shape than all experts' (and is no scalar).
    """
    from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

    shards = _by_name(model)
    mine: State = {"state": {}, "param_groups": [dict(group) for group in state["param_groups"]]}
    for name, values in state["state"].items():
        mine["state"][name] = dict(values)
        if name in shards:
            for key, value in values.items():
                if isinstance(value, torch.Tensor) and value.dim() > 0:
                    try:
                        # The optimizer keeps what it is given where dtype and device fit: never a view of the whole.
                        mine["state"][name][key] = shards[name].part(value).clone(memory_format=torch.contiguous_format)
                    except InvalidValueError as error:
                        raise InvalidValueError(f"{name}: {key}: {error}") from None
    set_optimizer_state_dict(model, optimizer, mine)


def _by_name(model: nn.Module) -> dict[str, Shard]:
    """By the names that torch gives optimizer states: without what wrappers put in between."""
    from torch.distributed.checkpoint.state_dict import _get_fqns

    return {next(iter(_get_fqns(model, name))): shard for name, _, shard in own_parameters(model)}


def _whole(shard: Shard, value: torch.Tensor, what: str) -> torch.Tensor:
    if tuple(value.shape) != shard.local_shape:
        raise InvalidValueError(
            f"{what} has shape {tuple(value.shape)}, its parameter {shard.local_shape}: how it is spread over the ranks"
            " is not known"
        )
    return shard.whole(value)
