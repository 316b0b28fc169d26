"""The gates of a script's layer: modules that map tokens [T, M] to logits [T, E], under the names of its checkpoints.

The layer reads `top_k`, `gate_noise` and `capacity_factor` of them on every call.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from tutelx import env
from tutelx.errors import InvalidTypeError, InvalidValueError
from tutelx.gates.base import linear

_READ_BY_THE_LAYER = ("capacity_factor", "gate_noise")


class LinearTopKGate(nn.Module):
    """`wg`, a bias-free linear router; with `fp32_gate` it is made and computed in float32."""

    def __init__(self, model_dim: int, num_global_experts: int, k: int = 1, fp32_gate: bool = False, **options) -> None:
        super().__init__()
        _check_options("top", options)
        dtype = torch.float32 if fp32_gate else None
        self.wg = nn.Linear(model_dim, num_global_experts, bias=False, dtype=dtype)
        self.top_k = at_most(k, num_global_experts)
        self.fp32_gate = fp32_gate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, M] -> [T, E]."""
        weight = self.wg.weight
        if self.fp32_gate and weight.dtype in (torch.bfloat16, torch.float16):  # converted since it was made
            return linear(x, weight, fp32=True)
        return self.wg(x.to(weight.dtype))


class CosineTopKGate(nn.Module):
    """Cosine of the projected token and an expert's embedding, times a learnt scale of at most 100 (Swin V2)."""

    def __init__(
        self,
        model_dim: int,
        num_global_experts: int,
        k: int = 1,
        fp32_gate: bool = False,
        proj_dim: int = 256,
        init_t: float = 0.5,
        **options,
    ) -> None:
        super().__init__()
        _check_options("cosine_top", options)
        self.top_k = at_most(k, num_global_experts)
        self.fp32_gate = fp32_gate
        self.temperature = nn.Parameter(torch.full([1], 1.0 / init_t).log())
        self.cosine_projector = nn.Linear(model_dim, proj_dim)
        self.sim_matrix = nn.Parameter(torch.randn(proj_dim, num_global_experts))
        self.clamp_max = math.log(1 / 0.01)
        nn.init.normal_(self.sim_matrix, 0, 0.01)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, M] -> [T, E]."""
        projector = self.cosine_projector
        dtype = torch.float32 if self.fp32_gate else projector.weight.dtype
        projected = F.linear(x.to(dtype), projector.weight.to(dtype), projector.bias.to(dtype))
        logits = F.normalize(projected, dim=1) @ F.normalize(self.sim_matrix.to(dtype), dim=0)
        return logits * self.temperature.clamp(max=self.clamp_max).exp().to(logits.dtype)


_GATES = {"top": LinearTopKGate, "cosine_top": CosineTopKGate}


def build_gates(
    gate_type: str | dict[str, Any] | Sequence[dict[str, Any]],
    *,
    model_dim: int,
    num_experts: int,
    seed: int | None,
) -> nn.ModuleList:
    """One gate, or several to choose among in each call; `seed` + n seeds the n-th before it is made.

    Raises:
        InvalidValueError, InvalidTypeError: an unknown type or option, nothing that describes a gate.
    """
    if isinstance(gate_type, str):
        found = re.fullmatch(r"Top([0-9]+)Gate", gate_type)
        if found is None:
            raise InvalidValueError(f"gate_type={gate_type!r} is not of the form 'Top2Gate'")
        gate_type = {"type": "top", "k": int(found[1])}
    described = [gate_type] if isinstance(gate_type, dict) else list(gate_type)
    gates = nn.ModuleList()
    for n, description in enumerate(described):
        if not isinstance(description, dict) or "type" not in description:
            raise InvalidTypeError(f"gate_type is {description!r}, expected a dict with 'type'")
        options = dict(description)
        if seed is not None:
            torch.manual_seed(seed + n)
        gates.append(_build(options.pop("type"), options, model_dim, num_experts))
    return gates


def _build(kind: str, options: dict[str, Any], model_dim: int, num_experts: int) -> nn.Module:
    if kind == "custom":
        if "module" not in options:
            raise InvalidValueError("gate_type has type='custom' and no 'module'")
        make = options.pop("module")
    elif kind in _GATES:
        make = _GATES[kind]
    else:
        raise InvalidValueError(f"gate_type has type={kind!r}, expected one of {(*_GATES, 'custom')}")
    gate = make(model_dim=model_dim, num_global_experts=num_experts, **options)
    for name, default in (("gate_noise", 0.0), ("capacity_factor", env.default_capacity_factor())):
        if not hasattr(gate, name):
            setattr(gate, name, options.get(name, default))
    return gate


def at_most(k: object, num_experts: int) -> int:
    """K, which more than E means E.

    Raises:
        InvalidValueError: below 1, or no whole number.
    """
    if isinstance(k, bool) or not isinstance(k, (int, float)) or k != int(k) or k < 1:
        raise InvalidValueError(f"k={k!r} must be an int of at least 1")
    return min(num_experts, int(k))


def _check_options(kind: str, options: dict[str, Any]) -> None:
    for name in options:
        if name not in _READ_BY_THE_LAYER:
            raise InvalidTypeError(f"the gate {kind!r} has no option {name!r}; the layer takes {_READ_BY_THE_LAYER}")
