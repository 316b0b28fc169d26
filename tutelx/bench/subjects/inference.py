"""A whole MoE layer without gradients, as in decoding: few tokens, so that reading the weights is what it costs."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from tutelx.bench import limits
from tutelx.bench.shapes import Shape
from tutelx.bench.subject import Subject, Tensors, Way
from tutelx.bench.subjects.layer import LayerInputs, grouped_mm, make, routing
from tutelx.bench.subjects.route import touched


def _make(shape: Shape, dtype: torch.dtype) -> LayerInputs:
    inputs = make(shape, dtype)
    inputs.layer.requires_grad_(False).eval()
    inputs.x_TD.requires_grad_(False)
    return inputs


def _weights(inputs: LayerInputs) -> Tensors:
    """Those of the experts that get a row."""
    return tuple(stacked[e] for e, _, _ in inputs.used for stacked in inputs.leaves[2:])


@torch.no_grad()
def _ours(inputs: LayerInputs) -> torch.Tensor:
    return inputs.layer(inputs.x_TD)


@torch.no_grad()
def _loop(inputs: LayerInputs) -> torch.Tensor:
    """Only the experts that are asked for; which they are, the host has to wait for."""
    weights_TK, ids_TK = routing(inputs)
    y_TD = torch.zeros_like(inputs.x_TD)
    gates, ups, downs = inputs.leaves[2:]
    for e in ids_TK.unique().tolist():
        tokens, choices = torch.where(ids_TK == e)
        x = inputs.x_TD[tokens]
        out = (F.silu(x @ gates[e].T) * (x @ ups[e].T)) @ downs[e].T
        y_TD.index_add_(0, tokens, out * weights_TK[tokens, choices, None].to(out.dtype))
    return y_TD


SUBJECTS = (
    Subject(
        op="layer_inference",
        make=_make,
        ours=_ours,
        plain=(Way(name="loop of experts", call=_loop), Way(name="grouped_mm", call=torch.no_grad()(grouped_mm))),
        reads=_weights,
        must_move=lambda shape, S: limits.layer_inference(shape, S, touched(shape)),
    ),
)
