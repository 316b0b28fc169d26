"""What a checkpoint must be made to fit before a layer loads it: other shapes of one tensor, what older ones lack."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from tutelx.errors import InvalidValueError

_log = logging.getLogger("tutelx")
COUNT = "_num_global_experts"


def fit(layer: nn.Module, state: dict[str, Any], prefix: str) -> None:
    """Changes `state`, which `load_state_dict` made for itself.

    A checkpoint without the number of experts is of an early version, and loads. A bias that it lacks is zero, as if
    there were none; a missing weight is left to `load_state_dict`, which raises.

    Raises:
        InvalidValueError: it holds another number of experts.
    """
    count = layer.get_buffer(COUNT)
    if prefix + COUNT not in state:
        _log.warning(
            "%s%s is missing: a checkpoint of an early version, taken as one of %d experts", prefix, COUNT, count
        )
        state[prefix + COUNT] = count
    elif int(state[prefix + COUNT]) != int(count):
        raise InvalidValueError(
            f"the checkpoint holds {int(state[prefix + COUNT])} experts at {prefix or 'the layer itself'}, the layer"
            f" has {int(count)}"
        )
    for name, parameter in layer.experts.named_parameters():  # type: ignore[union-attr]
        key = f"{prefix}experts.{name}"
        if key not in state:
            if name.endswith("bias"):
                _log.warning("%s is missing in the checkpoint: taken as zero", key)
                state[key] = torch.zeros_like(parameter)
        elif state[key].numel() == parameter.numel():
            state[key] = state[key].reshape(parameter.shape)
