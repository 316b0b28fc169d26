"""From a module to a LayerSpec, or to the reason why not."""

from __future__ import annotations

import math

import torch
from torch import nn

from tutelx.integrations import llama
from tutelx.integrations.formula import find_formula
from tutelx.integrations.parity import TOLERANCE, gradients, largest_error, relative_error, within
from tutelx.integrations.probe import observe
from tutelx.integrations.replacement import WrappedMoE
from tutelx.integrations.sandbox import Sandbox, Values
from tutelx.integrations.spec import Declined, LayerSpec, Undecided
from tutelx.integrations.subject import TOKENS, Subject
from tutelx.planner import RulePlanner
from tutelx.types import Capacity

is_candidate = llama.is_candidate

# Other weights than the layer's own are tried only while they are small beside it in memory.
_MOST_RANDOM_BYTES = 2**30
# Gradients are compared for their structure (what is detached, what is missing), so rounding gets room.
_GRADIENT_SLACK = 100.0
_MOST_GRADIENT_ERROR = 0.3


def recognise(layer: nn.Module) -> LayerSpec:
    """What the layer computes. It is run on a few tokens and left as it was.

    Raises:
        Declined: it is not certain to be one of the known layers; the message names what has no place.
    """
    parts = llama.find_parts(layer)
    with Sandbox(layer) as sandbox:
        try:
            spec = _examine(layer, parts, sandbox)
        except Declined:
            raise
        except Exception as error:
            raise Declined("forward", f"raises {type(error).__name__}: {error}") from error
    return spec


def _examine(layer: nn.Module, parts: llama.Parts, sandbox: Sandbox) -> LayerSpec:
    experts = layer._modules[parts.experts]
    assert isinstance(experts, nn.ModuleList)
    formula = find_formula(experts[0], parts.model_dim, f"{parts.experts}.0")
    subject = Subject(layer, parts, formula)
    try:
        observed = observe(subject)
    except Undecided as undecided:
        subject = Subject(layer, parts, formula, _random_values(layer, undecided))
        observed = observe(subject)
    if changed := sandbox.changed():
        raise Declined(changed[0], "is changed by the forward, and would no longer be")
    with torch.enable_grad():
        specs = [
            LayerSpec(
                router=parts.router,
                experts=parts.experts,
                model_dim=parts.model_dim,
                num_experts=parts.num_experts,
                formula=formula,
                rule=rule,
                zero_unused=_zero_unused(subject),
                returns=observed.returns,
                rank=subject.rank,
                input_name=parts.input_name,
                keeps_dtype=observed.keeps_dtype,
            )
            for rule in observed.rules
        ]
        return _by_gradients(subject, specs)


def _random_values(layer: nn.Module, undecided: Undecided) -> Values:
    if sum(p.numel() * p.element_size() for p in layer.parameters()) > _MOST_RANDOM_BYTES:
        raise undecided
    generator = torch.Generator().manual_seed(0)
    return {
        p: (torch.randn(p.shape, generator=generator) / math.sqrt(p.shape[-1])).to(p.device, p.dtype)
        for p in layer.parameters()
    }


def _one_of_each(subject: Subject) -> tuple[list[str], list[str]]:
    """Names of the router's parameters, and of each expert's smallest one: as telling as all, and lighter."""
    parts = subject.parts
    names = {id(p): name for name, p in subject.layer.named_parameters()}
    router = [names[id(p)] for p in subject.router.parameters()]
    experts = [names[id(min(expert.parameters(), key=torch.Tensor.numel))] for expert in subject.experts]
    assert len(experts) == parts.num_experts
    return router, experts


def _input(subject: Subject, x_TM: torch.Tensor) -> torch.Tensor:
    if subject.rank == 2:
        return x_TM
    return x_TM.reshape(2, -1, x_TM.shape[1]) if len(x_TM) > 1 else x_TM.unsqueeze(0)


def _zero_unused(subject: Subject) -> bool:
    """With a single token, do the experts that it did not choose get a gradient of zero, or none?"""
    _, experts = _one_of_each(subject)
    x = _input(subject, subject.tokens(0)[:1])
    grads: dict[str, torch.Tensor | None] = {}
    left = experts
    while left:  # few gradients at a time
        names = within(subject.layer, left)
        grads |= {name: _trace(g) for name, g in gradients(subject.layer, x, names, subject.values)[1].items()}
        left = left[len(names) :]
    unused = {name for name in experts if grads[name] is None or not grads[name].any()}  # type: ignore[union-attr]
    without = {name for name in unused if grads[name] is None}
    if without and without != unused:
        raise Declined(without.pop(), "has no gradient where other unused experts have one of zero")
    return not without


def _trace(gradient: torch.Tensor | None) -> torch.Tensor | None:
    """Enough to tell a gradient of zeros, and none, from any other."""
    return None if gradient is None else gradient.any()


def _by_gradients(subject: Subject, specs: list[LayerSpec]) -> LayerSpec:
    """The spec whose gradients are the layer's: rules that agree in the output may differ in how they round there."""
    router, experts = _one_of_each(subject)
    names = {*router, *within(subject.layer, experts)}
    x = _input(subject, subject.tokens(0, 4 * TOKENS))
    expected_y, expected = gradients(subject.layer, x, names, subject.values)
    results = []
    for spec in specs:
        wrapped = WrappedMoE(subject.layer, spec, capacity=Capacity.dropless(), planner=RulePlanner())
        wrapped.plain = True
        given_y, given = gradients(wrapped, x, names, subject.values)
        results.append((relative_error(given_y, expected_y), *largest_error(given, expected, spec.vanishing(names))))
    tolerance = TOLERANCE[subject.parts.dtype]
    best = min(range(len(specs)), key=lambda i: results[i][1])
    output_error, gradient_error, where = results[best]
    if output_error > tolerance:
        reason = f"computes something else where gradients are recorded: relative error {output_error:.1e}"
        raise Declined("forward", reason)
    if gradient_error > min(_GRADIENT_SLACK * tolerance, _MOST_GRADIENT_ERROR):
        reason = f"has another gradient: relative error {gradient_error:.1e}"
        raise Declined(where or subject.parts.input_name, reason)
    return specs[best]
