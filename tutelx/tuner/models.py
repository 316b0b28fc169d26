"""Shapes of the MoE layers in a model, or in the state of one that was saved."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tutelx.errors import InvalidValueError
from tutelx.experts import FeedForwardExperts
from tutelx.integrations.spec import ExpertsSpec, LayerSpec, LibrarySpec
from tutelx.layer import MoE
from tutelx.tuner.shapes import DTYPES, Kind, Shape
from tutelx.wrapping import explain

_LISTED = re.compile(r"(.*\bexperts)\.(\d+)\.(.+)\.(weight|bias)")
_STACKED = re.compile(
    r"(.*\bexperts)\.(gate_up_proj|gate_proj|up_proj|down_proj|up_bias|gate_up_proj_bias|up_proj_bias)"
)


def shapes(model: Any) -> list[Shape]:
    """Of each layer, in the model's order; see :func:`tutelx.tuner.shapes_of`."""
    reports = explain(model)
    found = [_of_layer(module) for module in model.modules() if isinstance(module, MoE)]
    for report in reports:
        if report.spec is not None:
            found.append(_of_spec(report.spec, model.get_submodule(report.name)))
    layers = [shape for shape in found if shape is not None]
    if not layers:
        why = "; ".join(str(report) for report in reports) or "nothing in it looks like an MoE layer"
        raise InvalidValueError(f"{type(model).__name__} has no MoE layer that can be tuned: {why}")
    return layers


def shapes_of_state(state: Mapping[str, torch.Tensor], source: str) -> list[Shape]:
    """Of a saved model, by the names and sizes of its tensors: stacked experts (of tutelx.MoE and of transformers), or
    numbered ones with two or three matrices each.

    Raises:
        InvalidValueError: it has no such experts.
    """
    stacked: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    listed: dict[str, dict[int, dict[str, torch.Tensor]]] = defaultdict(lambda: defaultdict(dict))
    for name, tensor in state.items():
        if match := _LISTED.fullmatch(name):
            listed[match[1]][int(match[2])][f"{match[3]}.{match[4]}"] = tensor
        elif match := _STACKED.fullmatch(name):
            stacked[match[1]][match[2]] = tensor
    found = [shape for parts in stacked.values() if (shape := _of_stacked(parts)) is not None]
    found += [shape for experts in listed.values() if (shape := _of_listed(experts)) is not None]
    if not found:
        raise InvalidValueError(f"{source} holds no experts that can be recognised by the names of their tensors")
    return list(dict.fromkeys(found))


def _of_layer(layer: MoE) -> Shape | None:
    experts = layer.experts
    if not isinstance(experts, FeedForwardExperts):
        return None
    return Shape(
        model_dim=layer.model_dim,
        hidden_dim=experts.hidden_dim,
        num_experts=layer.num_experts,
        experts="gated" if experts.gated else "ffn",
        bias=experts.has_bias,
        dtype=_dtype(experts.up_proj),
    )


def _of_spec(spec: LayerSpec | LibrarySpec | ExpertsSpec, layer: nn.Module) -> Shape | None:
    if not isinstance(spec, ExpertsSpec):
        formula = spec.formula
        if formula is None:
            return None
        gated, bias, hidden_dim = formula.gate is not None, bool(formula.biased), formula.hidden_dim
    else:
        gated, bias, hidden_dim = spec.gated, spec.bias, spec.hidden_dim
    return Shape(
        model_dim=spec.model_dim,
        hidden_dim=hidden_dim,
        num_experts=spec.num_experts,
        experts="gated" if gated else "ffn",
        bias=bias,
        dtype=_dtype(next(layer.parameters())),
    )


def _of_stacked(parts: dict[str, torch.Tensor]) -> Shape | None:
    up, down = parts.get("gate_up_proj", parts.get("up_proj")), parts.get("down_proj")
    if up is None or down is None or up.dim() != 3 or down.dim() != 3:
        return None
    fused = "gate_up_proj" in parts
    # [E, G, M] and [E, M, H], or both transposed; G = 2H if the gate is in it.
    for model_dim, hidden_dim in ((down.shape[1], down.shape[2]), (down.shape[2], down.shape[1])):
        if sorted(up.shape[1:]) == sorted((model_dim, hidden_dim * (2 if fused else 1))):
            return Shape(
                model_dim=model_dim,
                hidden_dim=hidden_dim,
                num_experts=up.shape[0],
                experts="gated" if fused or "gate_proj" in parts else "ffn",
                bias=any("bias" in name for name in parts),
                dtype=_dtype(up),
            )
    return None


def _of_listed(experts: dict[int, dict[str, torch.Tensor]]) -> Shape | None:
    first = experts[min(experts)]
    matrices = [tensor for tensor in first.values() if tensor.dim() == 2]
    if len(matrices) not in (2, 3):
        return None
    shapes = [tuple(matrix.shape) for matrix in matrices]
    up = shapes[0] if len(shapes) == 2 else max(shapes, key=shapes.count)
    if sorted(shapes) != sorted([up] * (len(shapes) - 1) + [up[::-1]]):
        return None
    kind: Kind = "gated" if len(shapes) == 3 else "ffn"
    bias = any(name.endswith(".bias") for name in first)
    return Shape(
        model_dim=up[1],
        hidden_dim=up[0],
        num_experts=len(experts),
        experts=kind,
        bias=bias,
        dtype=_dtype(matrices[0]),
    )


def _dtype(tensor: torch.Tensor) -> str:
    name = str(tensor.dtype).removeprefix("torch.")
    return name if name in DTYPES else "float32"
