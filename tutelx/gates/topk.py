"""The softmax (or sigmoid) top-K gate of Mixtral, DeepSeekMoE and the Llama-style layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tutelx import ops
from tutelx.errors import InvalidValueError
from tutelx.gates.base import (
    LinearGate,
    Router,
    balance_and_z,
    check_at_most,
    check_coefficients,
    check_ints,
    top_score,
)
from tutelx.hooks import intercepted
from tutelx.ops.gate import Score
from tutelx.types import Capacity, Routing


@dataclass(frozen=True, kw_only=True)
class TopK:
    """How tokens choose experts; :meth:`build` makes the module that does it.

    k: experts a token, 1..E; a call may ask for another. k = E is the dense softmax mixture.
    score: "softmax" over all experts, or a "sigmoid" for each.
    normalize: a token's weights are divided by their sum. With softmax this is a softmax over the K chosen logits
        (Mixtral); without it the weights are the affinities themselves (DeepSeekMoE, eq. 9).
    score_dtype: None computes scores in float32, and in float64 for float64 input; torch.float32 forces float32.
    fp32_router: the router's product is computed in float32 too, whatever the layer's dtype.
    balance_coef: coefficient of Switch's load-balancing loss.
    z_coef: coefficient of the router z-loss.
    """

    k: int = 2
    score: Score = "softmax"
    normalize: bool = True
    score_dtype: torch.dtype | None = None
    fp32_router: bool = False
    balance_coef: float = 0.01
    z_coef: float = 0.0

    def __post_init__(self) -> None:
        check_ints(k=self.k)
        check_coefficients(balance_coef=self.balance_coef, z_coef=self.z_coef)
        if self.score not in ("softmax", "sigmoid"):
            raise InvalidValueError(f"score={self.score!r} is neither 'softmax' nor 'sigmoid'")
        if self.score_dtype not in (None, torch.float32):
            raise InvalidValueError(f"score_dtype={self.score_dtype} is neither None nor torch.float32")

    def build(self, model_dim: int, num_experts: int, *, device=None, dtype=None) -> TopKGate:
        return TopKGate(self, model_dim, num_experts, device=device, dtype=dtype)

    def route(self, logits: torch.Tensor, top_k: int | None = None, *, prioritized: bool = False) -> Routing:
        """logits [T, E] -> the Routing of T tokens."""
        scored = logits.to(self.score_dtype) if self.score_dtype else logits
        gated = ops.gate(scored, self.k if top_k is None else top_k, score=self.score, normalize=self.normalize)
        return Routing(
            expert_ids=gated.expert_ids,
            weights=gated.weights,
            aux_losses=balance_and_z(logits, gated, balance_coef=self.balance_coef, z_coef=self.z_coef),
            logits=logits,
            priority=top_score(scored, gated, self.score) if prioritized else None,
        )


class TopKGate(LinearGate):
    """A bias-free linear router whose state dict is that of a plain `nn.Linear`: `weight` [E, M]."""

    def __init__(self, config: TopK, model_dim: int, num_experts: int, *, device=None, dtype=None) -> None:
        check_at_most("k", config.k, num_experts)
        super().__init__(model_dim, num_experts, fp32=config.fp32_router, device=device, dtype=dtype)
        self.config = config

    def forward(  # type: ignore[override]
        self,
        x: torch.Tensor,
        top_k: int | None = None,
        *,
        capacity: Capacity | None = None,
        prioritized: bool = False,
    ) -> Routing:
        """x [T, M] -> Routing."""
        return self.config.route(self.logits(x), top_k, prioritized=prioritized)

    def router(self) -> Router | None:
        """Where calling this module without a gradient does no more than that; else None."""
        config = self.config
        plain = type(self) is TopKGate and not (self.training or self.fp32 or intercepted(self))
        return Router(self.weight, config.k, config.score, config.normalize) if plain else None
