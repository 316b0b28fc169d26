"""Experts that a script brings: a module called with its padded rows and the layer. Shapes as in `experts`."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tutelx.errors import InvalidTypeError, InvalidValueError
from tutelx.integrations.tutel.experts import BuiltIn, FusedExpertsNetwork, LlamaFFNNetwork
from tutelx.integrations.tutel.sharing import batched, run_resized
from tutelx.types import DispatchMap, ExpertKernel, Layout, Plan

if TYPE_CHECKING:
    from tutelx.comm.call import RankCall
    from tutelx.comm.placement import Placement

_BUILT_IN: dict[str, type[BuiltIn]] = {"ffn": FusedExpertsNetwork, "llama_ffn": LlamaFFNNetwork}
_GONE = {
    "fused_custom_fn": "bring a module: {'type': 'custom', 'module': ...}",
    "implicit_dropout_p": "put a torch.nn.Dropout into activation_fn, and one behind the layer",
}


def build_experts(options: dict[str, Any], *, model_dim: int, num_local: int, slices: int) -> nn.Module:
    """The module that a script describes; `options` is its own to keep.

    Raises:
        InvalidValueError, InvalidTypeError: an unknown type, or options that it does not take.
    """
    options = dict(options)
    kind = options.pop("type", None)
    sizes = {"model_dim": model_dim, "num_experts_per_device": num_local, "sharded_count": slices}
    if kind == "custom":
        if "module" not in options:
            raise InvalidValueError("experts has type='custom' and no 'module'")
        make = options.pop("module")
        takes = inspect.signature(make).parameters
        if "local_experts" in takes and "num_experts_per_device" not in takes:
            sizes["local_experts"] = sizes.pop("num_experts_per_device")
        return make(**options, **sizes)
    if kind not in _BUILT_IN:
        raise InvalidValueError(f"experts has type={kind!r}, expected one of {(*_BUILT_IN, 'custom')}")
    for name in options:
        if name in _GONE:
            raise InvalidTypeError(f"experts has no option {name!r} any more: {_GONE[name]}")
        if name not in inspect.signature(_BUILT_IN[kind]).parameters:
            raise InvalidTypeError(f"the experts {kind!r} have no option {name!r}")
    return _BUILT_IN[kind](**options, **sizes)


class CustomExperts:
    """A script's module for one call, as the layer asks of its experts. Not a module: nothing is registered twice.

    reserved: the shape of a token, of M numbers in all. out_shape: that of what the module made of it.
    """

    layouts: tuple[Layout, ...] = ("padded",)
    expert_kernels: tuple[ExpertKernel, ...] = ("tiled",)
    hidden_dim = 0
    numbers = 0  # what the module may gather is its own affair

    def __init__(self, module: nn.Module, layer: Any, reserved: tuple[int, ...]) -> None:
        self._module, self._layer, self._reserved = module, layer, reserved
        self.out_shape = reserved

    def parameters(self) -> Iterator[nn.Parameter]:
        return self._module.parameters()

    def kernels_for(self, x: torch.Tensor) -> tuple[ExpertKernel, ...]:
        return self.expert_kernels

    def shard_degrees(self, placement: Placement) -> tuple[int, ...]:
        """The one that the script asks for: only it knows what its module can do."""
        return (self._layer.adaptive_degree,)

    def describe(self) -> str:
        return type(self._module).__name__[:24]

    def __call__(self, rows: torch.Tensor, map: DispatchMap, plan: Plan | None = None) -> torch.Tensor:
        """Padded rows [E*C, M] -> [E*C, O]."""
        rows_ECM = batched(rows, map)
        y = self._module(rows_ECM.view(*rows_ECM.shape[:2], *self._reserved), self._layer)
        if not isinstance(y, torch.Tensor) or y.shape[:2] != rows_ECM.shape[:2] or y.dim() < 3:
            given = tuple(y.shape) if isinstance(y, torch.Tensor) else type(y).__name__
            raise InvalidValueError(f"experts returned {given} for rows {tuple(rows_ECM.shape)}, expected [E, C, ...]")
        self.out_shape = tuple(y.shape[2:])
        return y.reshape(rows.shape[0], math.prod(self.out_shape))

    def across(self, rows: torch.Tensor, call: RankCall, plan: Plan) -> torch.Tensor:
        parameters = [p for p in self.parameters() if p.requires_grad]
        return run_resized(call, rows, self, parameters, plan, out_dim=None)
