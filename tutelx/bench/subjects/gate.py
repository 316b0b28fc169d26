"""gate and its backward: softmax over all experts, the K best, normalised. T tokens, E experts, K choices."""

from __future__ import annotations

from typing import NamedTuple

import torch

from tutelx import ops
from tutelx.bench import limits
from tutelx.bench.shapes import Shape
from tutelx.bench.subject import Subject, Tensors, Way
from tutelx.ops import reference
from tutelx.ops._library import calls
from tutelx.testing import cases


class GateInputs(NamedTuple):
    logits: torch.Tensor
    top_k: int


class GateBackwardInputs(NamedTuple):
    grad_weights: torch.Tensor
    grad_score_sum: torch.Tensor
    grad_logsumexp: torch.Tensor
    logits: torch.Tensor
    expert_ids: torch.Tensor
    logsumexp: torch.Tensor


def _make(shape: Shape, dtype: torch.dtype) -> GateInputs:
    return GateInputs(cases.tensor(shape.T, shape.E, dtype=dtype), shape.K)


def _wide(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _topk(inputs: GateInputs) -> Tensors:
    logits = _wide(inputs.logits)
    scores = torch.softmax(logits, dim=1)
    weights, ids = scores.topk(inputs.top_k, dim=1)
    return ids, weights / weights.sum(dim=1, keepdim=True), scores.sum(dim=0), logits.logsumexp(dim=1)


def _without_ties(inputs: GateInputs, output: Tensors) -> Tensors:
    """torch.topk takes any of equal logits: the chosen logits are compared, not their indices."""
    ids, weights, score_sum, logsumexp = output
    return inputs.logits.gather(1, ids.long()), weights, score_sum, logsumexp


def _make_backward(shape: Shape, dtype: torch.dtype) -> GateBackwardInputs:
    logits = cases.tensor(shape.T, shape.E, dtype=dtype)
    gated = ops.gate(logits, shape.K)
    wide = gated.weights.dtype
    return GateBackwardInputs(
        grad_weights=cases.tensor(shape.T, shape.K, dtype=wide, seed=1),
        grad_score_sum=cases.tensor(shape.E, dtype=wide, seed=2),
        grad_logsumexp=cases.tensor(shape.T, dtype=wide, seed=3),
        logits=logits,
        expert_ids=gated.expert_ids,
        logsumexp=gated.logsumexp,
    )


def _backward_in_torch(inputs: GateBackwardInputs) -> torch.Tensor:
    ids = inputs.expert_ids.long()
    scores = torch.exp(_wide(inputs.logits) - inputs.logsumexp[:, None])
    chosen = scores.gather(1, ids)
    total = chosen.sum(dim=1, keepdim=True)
    mean = (inputs.grad_weights * chosen).sum(dim=1, keepdim=True) / total
    grad = inputs.grad_score_sum.expand_as(scores).scatter_add(1, ids, (inputs.grad_weights - mean) / total)
    dot = (grad * scores).sum(dim=1, keepdim=True)
    return (scores * (grad - dot + inputs.grad_logsumexp[:, None])).to(inputs.logits.dtype)


SUBJECTS = (
    Subject(
        op="gate",
        make=_make,
        ours=lambda inputs: ops.gate(inputs.logits, inputs.top_k),
        plain=(Way(name="softmax + topk", call=_topk),),
        reference=lambda inputs: reference.gate(inputs.logits, inputs.top_k),
        must_move=limits.gate,
        compared=_without_ties,
    ),
    Subject(
        op="gate_backward",
        make=_make_backward,
        ours=lambda inputs: calls.gate_backward(*inputs, "softmax", True),
        plain=(Way(name="scatter_add", call=_backward_in_torch),),
        must_move=limits.gate_backward,
        gradients=True,
    ),
)
