"""A dense model becomes a Mixture-of-Experts model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from tutelx.base import MoEBase
from tutelx.errors import InvalidTypeError, InvalidValueError
from tutelx.experts import FeedForwardExperts
from tutelx.experts.linked import ExpertFormula
from tutelx.gates import GateConfig
from tutelx.integrations.formula import find_formula
from tutelx.integrations.sandbox import Sandbox
from tutelx.integrations.spec import Declined
from tutelx.layer import MoE
from tutelx.types import Capacity

_log = logging.getLogger("tutelx")


def convert_dense(
    model: nn.Module,
    num_experts: int | Sequence[int],
    *,
    every: int = 2,
    gate: GateConfig | None = None,
    upcycle: bool = False,
    layers: Callable[[str, nn.Module], bool] | None = None,
    expert_dropout: float = 0.0,
    capacity: Capacity | None = None,
    eval_capacity: Capacity | None = None,
    batch_prioritized: bool = False,
) -> nn.Module:
    """Turns feed-forward networks of a dense model into MoE layers, in place; make the optimizer afterwards.

    A feed-forward network is a module of two `nn.Linear`, or three if gated, that computes down(act(up(x))) or
    down(act(gate(x)) * up(x)) with silu, gelu, gelu_tanh or relu: it is recognised by running it on random tokens.
    Its own dropout is not carried over.

    Args:
        num_experts: E; or one number for each converted layer, first to last: a pyramid has more experts in later
            layers (DeepSpeed-MoE, section 4.1.2).
        every: of the networks found, the every-th is converted: 2 takes the second, fourth, ...; 1 takes all.
        gate: how tokens choose experts; top-2 by default.
        upcycle: the experts start as copies of the network (Komatsuzaki et al. 2022). With a gate whose weights add up
            to 1 and without drops, the model's first output is then that of the dense one.
        layers: which of the networks found are counted at all, by name and module.
        expert_dropout, capacity, eval_capacity, batch_prioritized: as of :class:`tutelx.MoE`.

    Returns:
        The model; the new layer if the model itself is such a network.

    Raises:
        InvalidValueError: nothing to convert, or another number of layers than of entries in `num_experts`.
    """
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise InvalidValueError(f"every={every!r} must be an int of at least 1")
    if not isinstance(model, nn.Module):
        raise InvalidTypeError(f"model is {type(model).__name__}, expected a module")
    found = list(_networks(model, layers))
    chosen = found[every - 1 :: every]
    if not chosen:
        raise InvalidValueError(f"the model has {len(found)} feed-forward networks to convert, every={every}")
    numbers = [num_experts] * len(chosen) if isinstance(num_experts, int) else list(num_experts)
    if len(numbers) != len(chosen):
        names = ", ".join(name for name, _, _ in chosen)
        raise InvalidValueError(f"num_experts has {len(numbers)} entries for {len(chosen)} layers: {names}")
    made = []
    for (name, network, formula), number in zip(chosen, numbers):
        layer = _layer(
            network,
            formula,
            number,
            gate=gate,
            expert_dropout=expert_dropout,
            capacity=capacity,
            eval_capacity=eval_capacity,
            batch_prioritized=batch_prioritized,
        )
        layer.train(network.training)
        if upcycle:
            _copy_weights(network, formula, layer)
        made.append((name, layer))
    # All or nothing: a layer that cannot be built leaves the model as it was.
    for name, layer in made:
        _log.info("`%s` is now an MoE layer of %d experts", name or type(model).__name__, layer.num_experts)
        if not name:
            return layer
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    return model


def _networks(
    model: nn.Module, wanted: Callable[[str, nn.Module], bool] | None
) -> Iterator[tuple[str, nn.Module, ExpertFormula]]:
    """The outermost feed-forward networks, in the model's order, none of them inside an MoE layer."""
    passed: list[str] = []
    for name, module in model.named_modules():
        if any(not outer or name == outer or name.startswith(f"{outer}.") for outer in passed):
            continue
        if isinstance(module, MoEBase):
            passed.append(name)
            continue
        formula = _formula(module, name)
        if formula is not None:
            passed.append(name)
            if wanted is None or wanted(name, module):
                yield name, module, formula


def _formula(module: nn.Module, name: str) -> ExpertFormula | None:
    linears = [m for m in module.modules() if type(m) is nn.Linear]
    held = sum(p is not None for m in linears for p in m._parameters.values())
    if len(linears) not in (2, 3) or held != len(list(module.parameters())):
        return None
    first = next(module.parameters())
    if first.device.type == "meta":
        return None
    with Sandbox(module), torch.no_grad():
        module.eval()
        for model_dim in sorted({m.in_features for m in linears}):
            try:
                return find_formula(module, model_dim, name)
            except Declined as reason:
                _log.debug("`%s` is not converted: %s", name, reason)
    return None


def _layer(network: nn.Module, formula: ExpertFormula, num_experts: int, **arguments) -> MoE:
    up = network.get_submodule(".".join(formula.up))
    assert isinstance(up, nn.Linear)
    return MoE(
        up.in_features,
        formula.hidden_dim,
        num_experts,
        experts="ffn" if formula.gate is None else "gated",
        activation=formula.activation,
        bias=bool(formula.biased),
        device=up.weight.device,
        dtype=up.weight.dtype,
        **arguments,
    )


def _copy_weights(network: nn.Module, formula: ExpertFormula, layer: MoE) -> None:
    experts = layer.experts
    assert isinstance(experts, FeedForwardExperts)
    with torch.no_grad():
        for role, path in (("up", formula.up), ("down", formula.down), ("gate", formula.gate)):
            if path is None:
                continue
            linear = network.get_submodule(".".join(path))
            getattr(experts, f"{role}_proj").copy_(linear.weight)
            if experts.has_bias:
                bias = getattr(experts, f"{role}_bias")
                bias.zero_() if linear.bias is None else bias.copy_(linear.bias)
