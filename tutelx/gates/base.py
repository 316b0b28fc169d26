"""What the layer asks of a gate, and how anybody's module becomes one. T tokens, M model dim, E experts, K choices."""

from __future__ import annotations

import inspect
from typing import NamedTuple, Protocol

import torch
from torch import nn

from tutelx import ops
from tutelx.errors import InvalidTypeError, InvalidValueError
from tutelx.gates import losses
from tutelx.ops.gate import Gated, Score
from tutelx.types import Capacity, Routing


class Gate(Protocol):
    """x [T, M] -> Routing.

    top_k: for this call; None takes the gate's own.
    capacity: the setting of this call, for a gate that must know where rows end.
    prioritized: batch-prioritised routing: the gate fills `Routing.priority`.
    """

    def __call__(
        self, x: torch.Tensor, top_k: int | None = None, *, capacity: Capacity, prioritized: bool
    ) -> Routing: ...


class Router(NamedTuple):
    """A gate that is no more than `ops.linear` with weight [E, M] and `ops.gate`."""

    weight: torch.Tensor
    top_k: int
    score: Score
    normalize: bool


class GateConfig(Protocol):
    """A description of a gate; the layer calls :meth:`build` once."""

    def build(self, model_dim: int, num_experts: int, *, device=None, dtype=None) -> nn.Module: ...


class LinearGate(nn.Linear):
    """A bias-free linear router whose state dict is that of a plain `nn.Linear`: `weight` [E, M]."""

    def __init__(self, model_dim: int, num_experts: int, *, fp32: bool = False, device=None, dtype=None) -> None:
        super().__init__(model_dim, num_experts, bias=False, device=device, dtype=dtype)
        self.fp32 = fp32

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, M] -> [T, E]: in x's dtype, or in float32 inside the router only (float64 for float64 input)."""
        return linear(x, self.weight, fp32=self.fp32, training=self.training)


def linear(x: torch.Tensor, weight: torch.Tensor, *, fp32: bool, training: bool = True) -> torch.Tensor:
    """x @ weight.T; with `fp32` in float32 (float64 for float64 input), under autocast too.

    In training alike with and without a graph: a checkpointed call must choose the same.
    """
    if not fp32:
        return ops.linear(x, weight, alike=training)
    with torch.autocast(x.device.type, enabled=False):
        dtype = wide(x.dtype)
        return ops.linear(x.to(dtype), weight.to(dtype), alike=training)


def wide(dtype: torch.dtype) -> torch.dtype:
    """What scores and weights are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_at_most(name: str, k: int, num_experts: int) -> None:
    if k > num_experts:
        raise InvalidValueError(f"{name}={k} exceeds num_experts={num_experts}")


def check_ints(**values: object) -> None:
    """Each an int of at least 1."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InvalidValueError(f"{name}={value!r} must be an int of at least 1")


def check_coefficients(**values: object) -> None:
    """Each a finite number of at least 0."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
            raise InvalidValueError(f"{name}={value!r} must be a finite number of at least 0")


def top_score(logits: torch.Tensor, gated: Gated, score: Score) -> torch.Tensor:
    """[T], increasing with a token's best score before any normalisation: what batch-prioritised routing sorts by."""
    best = logits.detach().gather(1, gated.expert_ids[:, :1].long()).squeeze(1).to(gated.logsumexp.dtype)
    return best - gated.logsumexp.detach() if score == "softmax" else best


def balance_and_z(logits: torch.Tensor, gated: Gated, *, balance_coef: float, z_coef: float) -> dict[str, torch.Tensor]:
    """Switch's load-balancing loss and the router z-loss, times their coefficients; none where nothing is recorded."""
    aux = {}
    if torch.is_grad_enabled() and logits.requires_grad:
        if balance_coef:
            aux["balance"] = balance_coef * losses.switch_balance(gated.expert_ids, gated.score_sum)
        if z_coef:
            aux["z"] = z_coef * losses.router_z(gated.logsumexp)
    return aux


def by_priority(priority: torch.Tensor) -> torch.Tensor:
    """[T] the tokens, greatest priority first, the earlier one first among equals."""
    return priority.detach().argsort(descending=True, stable=True)


def row_limit(capacity: Capacity | None, *, tokens: int, top_k: int, num_experts: int) -> int | None:
    """Rows an expert may receive under a call's capacity; None if nothing is dropped."""
    return None if capacity is None else capacity.limit(tokens=tokens, top_k=top_k, num_experts=num_experts)


class CustomGate(nn.Module):
    """Somebody's module as a gate: it maps tokens [T, M] to logits [T, E], or to a Routing.

    Logits go through a top-K softmax, normalised over the K chosen, and K is 2 (1 for one expert) unless a call says
    otherwise. A Routing is taken as it is; `top_k`, `capacity` and `prioritized` are handed over to a forward that has
    arguments of these names.
    """

    def __init__(self, module: nn.Module, num_experts: int) -> None:
        super().__init__()
        self.module = module
        self.num_experts = num_experts
        parameters = inspect.signature(module.forward).parameters
        everything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        self._takes = {name for name in ("top_k", "capacity", "prioritized") if everything or name in parameters}

    def forward(
        self,
        x: torch.Tensor,
        top_k: int | None = None,
        *,
        capacity: Capacity | None = None,
        prioritized: bool = False,
    ) -> Routing:
        """x [T, M] -> Routing.

        Raises:
            InvalidTypeError: the module returned neither logits nor a Routing.
            InvalidValueError: a wrong shape, or a `top_k` that a module which returns a Routing does not take.
        """
        offered = {"top_k": top_k, "capacity": capacity, "prioritized": prioritized}
        found = self.module(x, **{name: value for name, value in offered.items() if name in self._takes})
        if isinstance(found, Routing):
            if top_k is not None and "top_k" not in self._takes:
                name = type(self.module).__name__
                raise InvalidValueError(f"top_k={top_k} was given, but {name}.forward has no argument top_k")
            return self._checked(found, x.shape[0])
        if not isinstance(found, torch.Tensor):
            name = type(self.module).__name__
            raise InvalidTypeError(f"{name} returned {type(found).__name__}, expected logits or a tutelx.Routing")
        expected = (x.shape[0], self.num_experts)
        if tuple(found.shape) != expected:
            raise InvalidValueError(f"the gate returned logits {tuple(found.shape)}, expected [T, E]={expected}")
        gated = ops.gate(found, min(2, self.num_experts) if top_k is None else top_k)
        return Routing(
            expert_ids=gated.expert_ids,
            weights=gated.weights,
            logits=found,
            priority=top_score(found, gated, "softmax") if prioritized else None,
        )

    def _checked(self, routing: Routing, tokens: int) -> Routing:
        ids, weights = routing.expert_ids, routing.weights
        if ids.dim() != 2 or ids.shape[0] != tokens or ids.shape[1] < 1:
            raise InvalidValueError(f"the gate returned expert_ids {tuple(ids.shape)}, expected [T={tokens}, K]")
        if weights.shape != ids.shape:
            raise InvalidValueError(
                f"the gate returned weights {tuple(weights.shape)} for expert_ids {tuple(ids.shape)}"
            )
        return routing


def build_gate(gate: GateConfig | nn.Module, model_dim: int, num_experts: int, *, device=None, dtype=None) -> nn.Module:
    """The module that a configuration describes; one of this package as it is; any other module as a custom gate.

    Raises:
        InvalidTypeError: neither a configuration nor a module.
    """
    if isinstance(gate, nn.Module):
        takes = inspect.signature(gate.forward).parameters
        return gate if {"top_k", "capacity", "prioritized"} <= takes.keys() else CustomGate(gate, num_experts)
    if not hasattr(gate, "build"):
        raise InvalidTypeError(f"gate is {type(gate).__name__}, expected a configuration with build() or a module")
    return build_gate(gate.build(model_dim, num_experts, device=device, dtype=dtype), model_dim, num_experts)
