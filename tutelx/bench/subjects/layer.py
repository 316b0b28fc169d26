"""A whole MoE layer, forward and backward: gated experts, dropless. T tokens, D model dim, E experts, H hidden dim."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from tutelx import ops
from tutelx.bench import limits
from tutelx.bench.shapes import Shape
from tutelx.bench.subject import Subject, Tensors, Way
from tutelx.bench.subjects.experts import spans
from tutelx.bench.subjects.route import ids_of, touched
from tutelx.gates import TopK
from tutelx.layer import MoE
from tutelx.testing import cases


@dataclass
class LayerInputs:
    """leaves: what gradients are asked for: x, the router's weight, the experts' gate, up and down.

    used: the experts that get a row, with begin and end, for the yardstick.
    """

    layer: MoE
    x_TD: torch.Tensor
    grad_y_TD: torch.Tensor
    top_k: int
    used: list[tuple[int, int, int]]

    @property
    def leaves(self) -> Tensors:
        experts = self.layer.experts
        return self.x_TD, self.layer.gate.weight, experts.gate_proj, experts.up_proj, experts.down_proj  # type: ignore[return-value]


def make(shape: Shape, dtype: torch.dtype) -> LayerInputs:
    """The tokens' routing is that of `cases.expert_ids`, with room between the scores: in low precision random
    logits have ties, and which of two equal experts is taken is nobody's error."""
    weights = cases.expert_weights(
        shape.E, shape.D, shape.H, gated=True, bias=False, listed=False, dtype=dtype, grad=False
    )
    layer = MoE(shape.D, shape.H, shape.E, gate=TopK(k=shape.K, balance_coef=0.0), dtype=dtype, device="meta")
    router = torch.zeros(shape.E, shape.D, dtype=dtype)
    router.fill_diagonal_(1)
    state = {
        "gate.weight": router,
        "experts.gate_proj": weights.gate[0],
        "experts.up_proj": weights.up[0],
        "experts.down_proj": weights.down[0],
    }
    layer.load_state_dict(state, assign=True)
    layer.requires_grad_(True)
    ids = ids_of(shape)
    x = cases.tensor(shape.T, shape.D, dtype=dtype, seed=8)
    x[:, : shape.E] = 0
    best_first = 1 + torch.arange(shape.K, 0, -1, dtype=dtype) / 8
    x.scatter_(1, ids.long().to(x.device), best_first.expand(ids.shape))
    return LayerInputs(
        layer=layer,
        x_TD=x.requires_grad_(),
        grad_y_TD=cases.tensor(shape.T, shape.D, dtype=dtype, seed=9),
        top_k=shape.K,
        used=spans(ops.route(ids, shape.E)),
    )


def gradients(y_TD: torch.Tensor, inputs: LayerInputs) -> Tensors:
    """y and its gradients in the leaves; nothing accumulates."""
    return y_TD.detach(), *torch.autograd.grad(y_TD, inputs.leaves, inputs.grad_y_TD)


def routing(inputs: LayerInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """The router in plain torch, for every way that begins after it: weights [T, K] and ids [T, K]."""
    logits = F.linear(inputs.x_TD, inputs.layer.gate.weight)  # type: ignore[arg-type]
    scores = torch.softmax(logits, dim=1, dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32)
    weights, ids = scores.topk(inputs.top_k, dim=1)
    return weights / weights.sum(dim=1, keepdim=True), ids


def _loop(inputs: LayerInputs) -> Tensors:
    """The loop over experts that most people write, with weights unbound once: indexing them one by one would cost a
    full-size gradient each."""
    weights_TK, ids_TK = routing(inputs)
    y_TD = torch.zeros_like(inputs.x_TD)
    for e, (gate, up, down) in enumerate(zip(*(leaf.unbind(0) for leaf in inputs.leaves[2:]))):
        tokens, choices = torch.where(ids_TK == e)
        x = inputs.x_TD[tokens]
        out = (F.silu(x @ gate.T) * (x @ up.T)) @ down.T
        y_TD = y_TD.index_add(0, tokens, out * weights_TK[tokens, choices, None].to(out.dtype))
    return gradients(y_TD, inputs)


def grouped_mm(inputs: LayerInputs) -> torch.Tensor:
    """Sort, three grouped products, weigh, add up: the forward in plain torch."""
    weights_TK, ids_TK = routing(inputs)
    gate, up, down = (leaf.transpose(1, 2) for leaf in inputs.leaves[2:])
    flat = ids_TK.reshape(-1)
    order = torch.argsort(flat, stable=True)
    ends = torch.bincount(flat, minlength=gate.shape[0]).cumsum(0).int()
    tokens = order // inputs.top_k
    x = inputs.x_TD.index_select(0, tokens)
    hidden = F.silu(F.grouped_mm(x, gate, offs=ends)) * F.grouped_mm(x, up, offs=ends)
    out = F.grouped_mm(hidden, down, offs=ends) * weights_TK.reshape(-1)[order].to(x.dtype).unsqueeze(1)
    return torch.zeros_like(inputs.x_TD).index_add(0, tokens, out)


def _grouped_mm(inputs: LayerInputs) -> Tensors:
    return gradients(grouped_mm(inputs), inputs)


def _gemms(inputs: LayerInputs) -> None:
    """Each expert's three products and the six of their backward, on as many rows as it gets, taken from the front of
    x and of y's gradient: nothing is gathered, activated or added up."""
    x_TD, _, gates, ups, downs = (leaf.detach() for leaf in inputs.leaves)
    for e, begin, end in inputs.used:
        x, grad = x_TD[: end - begin], inputs.grad_y_TD[: end - begin]
        gate, up, down = gates[e], ups[e], downs[e]
        torch.mm(x, gate.T)
        hidden = torch.mm(x, up.T)
        torch.mm(hidden, down.T)
        grad_hidden = torch.mm(grad, down)
        torch.mm(grad.T, hidden)
        torch.mm(grad_hidden.T, x)
        torch.mm(grad_hidden.T, x)
        torch.mm(grad_hidden, gate)
        torch.mm(grad_hidden, up)


SUBJECTS = (
    Subject(
        op="layer",
        make=make,
        ours=lambda inputs: gradients(inputs.layer(inputs.x_TD), inputs),
        plain=(
            Way(name="loop of experts", call=_loop),
            Way(name="grouped_mm", call=_grouped_mm),
        ),
        gemms=_gemms,
        must_move=lambda shape, S: limits.layer(shape, S, touched(shape)),
        flops=limits.layer_flops,
        gradients=True,
    ),
)
