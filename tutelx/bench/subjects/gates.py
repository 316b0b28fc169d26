"""Every gate, from tokens to rows and back to the gradient of the tokens, against its textbook form.

The router is the identity on T tokens of E numbers: what is timed is the gate, not a matrix product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from tutelx import gates, ops
from tutelx.bench import limits, textbook
from tutelx.bench.shapes import Shape
from tutelx.bench.subject import Subject, Tensors, Way
from tutelx.testing import cases
from tutelx.types import Capacity

CAPACITY = Capacity.fixed(1.25)


@dataclass
class GateInputs:
    gate: nn.Module
    x_TE: torch.Tensor
    top_k: int
    rows: int


class Routed(NamedTuple):
    """What a gate and the map give."""

    expert_ids: torch.Tensor
    weights: torch.Tensor
    kept: torch.Tensor
    aux: torch.Tensor
    grad: torch.Tensor


class Dense(NamedTuple):
    """What a textbook form gives: the weights [T, E] of what got a row."""

    weights: torch.Tensor
    aux: torch.Tensor
    grad: torch.Tensor


def _groups(shape: Shape) -> dict[str, Any]:
    """Four groups of which two are kept, where the sizes allow it."""
    fits = shape.E % 4 == 0 and shape.K <= shape.E // 2
    return {"num_groups": 4, "kept_groups": 2} if fits else {"num_groups": 1, "kept_groups": 1}


def _nested(shape: Shape) -> gates.Hierarchical:
    kept = 2 if shape.K % 2 == 0 and shape.E % 4 == 0 and shape.K // 2 <= shape.E // 4 else 1
    num_groups = 4 if shape.E % 4 == 0 and shape.K // kept <= shape.E // 4 else 1
    kept = min(kept, num_groups)
    return gates.Hierarchical(num_groups=num_groups, kept_groups=kept, k_inside=shape.K // kept)


Make = Callable[[Shape], gates.GateConfig]
CONFIGS: dict[str, Make] = {
    "gate_topk": lambda shape: gates.TopK(k=shape.K),
    "gate_noisy_topk": lambda shape: gates.NoisyTopK(k=shape.K),
    "gate_gshard": lambda shape: gates.GShardTop2(),
    "gate_switch": lambda shape: gates.Switch(k=shape.K, jitter=0.0),
    "gate_st_moe": lambda shape: gates.STMoE(),
    "gate_cosine": lambda shape: gates.Cosine(k=shape.K, dim=16),
    "gate_expert_choice": lambda shape: gates.ExpertChoice(k=shape.K),
    "gate_group_limited": lambda shape: gates.GroupLimited(k=shape.K, scale=1.0, **_groups(shape)),
    "gate_bias_balanced": lambda shape: gates.BiasBalanced(k=shape.K, **_groups(shape)),
    "gate_top_p": lambda shape: gates.TopP(p=0.6, k=shape.K),
    "gate_hierarchical": _nested,
}


def _maker(config: Make) -> Callable[[Shape, torch.dtype], GateInputs]:
    def make(shape: Shape, dtype: torch.dtype) -> GateInputs:
        gate: Any = config(shape).build(shape.E, shape.E, dtype=dtype)
        with torch.no_grad():
            for i, parameter in enumerate(gate.parameters()):
                if parameter.numel() > 1:
                    parameter.copy_(cases.tensor(*parameter.shape, seed=i) / shape.E**0.5)
            if hasattr(gate, "weight"):
                gate.weight.copy_(torch.eye(shape.E))
            if isinstance(gate, gates.HierarchicalGate):
                # A group's logit is that of its first expert, or in low precision two groups would tie.
                gate.group_weight.copy_(torch.eye(shape.E)[:: shape.E // gate.config.num_groups])
            if isinstance(gate, gates.BiasBalancedGate):
                gate.bias_correction.copy_(cases.tensor(shape.E, seed=3) / 8)
        # Distinct numbers, exact in low precision: no ties, which every form may break as it likes. Below 0, where
        # sigmoids differ: the gradients of nearly equal weights are small differences.
        order = cases.tensor(shape.T, shape.E, seed=4).argsort(dim=1)
        x_TE = ((order - shape.E) / 16).to(dtype).requires_grad_()
        limit = CAPACITY.limit(tokens=shape.T, top_k=shape.K, num_experts=shape.E)
        assert limit is not None
        return GateInputs(gate=gate, x_TE=x_TE, top_k=shape.K, rows=limit)

    return make


def _seed(x: torch.Tensor) -> None:
    """The same draws for every form. Not torch.manual_seed, which takes longer than a gate does."""
    generator = torch.cuda.default_generators[x.device.index] if x.is_cuda else torch.default_generator
    generator.manual_seed(0)


def _ours(inputs: GateInputs) -> Routed:
    _seed(inputs.x_TE)
    routing = inputs.gate(inputs.x_TE, inputs.top_k, capacity=CAPACITY, prioritized=False)
    rows = inputs.rows if routing.capacity is None else routing.capacity
    kept = ops.route(routing.expert_ids, inputs.x_TE.shape[1], rows).dest >= 0
    losses = list(routing.aux_losses.values())
    aux = torch.stack(losses).sum() if losses else routing.weights.new_zeros(())
    (grad,) = torch.autograd.grad((routing.weights.square() * kept).sum() + aux, inputs.x_TE)
    return Routed(routing.expert_ids, routing.weights.detach(), kept, aux.detach(), grad)


def _textbook(form: Callable[[GateInputs], textbook.Result]) -> Callable[[GateInputs], Dense]:
    def call(inputs: GateInputs) -> Dense:
        _seed(inputs.x_TE)
        weights, aux = form(inputs)
        (grad,) = torch.autograd.grad(weights.square().sum() + aux, inputs.x_TE)
        return Dense(weights.detach(), aux.detach(), grad)

    return call


def _compared(inputs: GateInputs, output: Any) -> Tensors:
    if isinstance(output, Dense):
        return output.weights, output.aux, output.grad
    if not isinstance(output, Routed):
        raise TypeError(f"{type(output).__name__} is no gate's output")
    ids = output.expert_ids.long().clamp_min(0)
    dense = torch.zeros(inputs.x_TE.shape, dtype=output.weights.dtype, device=ids.device)
    return dense.scatter_add(1, ids, output.weights * output.kept), output.aux, output.grad


def _wide(values: torch.Tensor) -> torch.Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _logits(inputs: GateInputs, weight: Any = None) -> torch.Tensor:
    return _wide(F.linear(inputs.x_TE, inputs.gate.weight if weight is None else weight))  # type: ignore[arg-type]


def _plain(form: Callable[..., textbook.Result]) -> Callable[[GateInputs], textbook.Result]:
    return lambda inputs: form(_logits(inputs), inputs.gate.config, inputs.top_k, inputs.rows)


def _noisy(inputs: GateInputs) -> textbook.Result:
    noise = _logits(inputs, inputs.gate.noise_weight)
    return textbook.noisy_topk(_logits(inputs), noise, inputs.gate.config, inputs.top_k, inputs.rows)


def _cosine(inputs: GateInputs) -> textbook.Result:
    gate: Any = inputs.gate
    projected = F.normalize(_wide(inputs.x_TE) @ _wide(gate.projection).T, dim=1)
    cosine = projected @ F.normalize(_wide(gate.embedding), dim=1).T
    logits = cosine / _wide(gate.temperature).clamp_min(gate.config.min_temperature)
    return textbook.topk(logits, gate.config, inputs.top_k, inputs.rows)


def _biased(inputs: GateInputs) -> textbook.Result:
    bias: Any = inputs.gate.bias_correction
    return textbook.bias_balanced(_logits(inputs), bias, inputs.gate.config, inputs.top_k, inputs.rows)


def _hierarchical(inputs: GateInputs) -> textbook.Result:
    groups = _logits(inputs, inputs.gate.group_weight)
    return textbook.hierarchical(groups, _logits(inputs), inputs.gate.config, inputs.top_k, inputs.rows)


FORMS: dict[str, Callable[[GateInputs], textbook.Result]] = {
    "gate_topk": _plain(textbook.topk),
    "gate_noisy_topk": _noisy,
    "gate_gshard": _plain(textbook.gshard),
    "gate_switch": _plain(textbook.switch),
    "gate_st_moe": _plain(textbook.st_moe),
    "gate_cosine": _cosine,
    "gate_expert_choice": _plain(textbook.expert_choice),
    "gate_group_limited": _plain(textbook.group_limited),
    "gate_bias_balanced": _biased,
    "gate_top_p": _plain(textbook.top_p),
    "gate_hierarchical": _hierarchical,
}

SUBJECTS = tuple(
    Subject(
        op=op,
        make=_maker(config),
        ours=_ours,
        plain=(Way(name="one-hot masks", call=_textbook(FORMS[op])),),
        must_move=limits.gate_and_route,
        compared=_compared,
        gradients=True,
    )
    for op, config in CONFIGS.items()
)
