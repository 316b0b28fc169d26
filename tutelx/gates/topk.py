"""The softmax (or sigmoid) top-K gate of Mixtral and the Llama-style layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from tutelx import ops
from tutelx.errors import InvalidValueError
from tutelx.gates import losses
from tutelx.ops.gate import Score
from tutelx.types import Routing


@dataclass(frozen=True, kw_only=True)
class TopK:
    """How tokens choose experts; :meth:`build` makes the module that does it.

    k: experts a token, 1..E; a call may ask for another.
    score: "softmax" over all experts, or a "sigmoid" for each.
    normalize: a token's weights are divided by their sum. With softmax this is a softmax over the K chosen logits.
    score_dtype: None computes scores in float32, and in float64 for float64 input; torch.float32 forces float32.
    balance_coef: coefficient of Switch's load-balancing loss.
    z_coef: coefficient of the router z-loss.
    """

    k: int = 2
    score: Score = "softmax"
    normalize: bool = True
    score_dtype: torch.dtype | None = None
    balance_coef: float = 0.01
    z_coef: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1:
            raise InvalidValueError(f"k={self.k!r} must be an int of at least 1")
        if self.score not in ("softmax", "sigmoid"):
            raise InvalidValueError(f"score={self.score!r} is neither 'softmax' nor 'sigmoid'")
        if self.score_dtype not in (None, torch.float32):
            raise InvalidValueError(f"score_dtype={self.score_dtype} is neither None nor torch.float32")

    def build(self, model_dim: int, num_experts: int, *, device=None, dtype=None) -> TopKGate:
        return TopKGate(self, model_dim, num_experts, device=device, dtype=dtype)

    def route(self, logits: torch.Tensor, top_k: int | None = None) -> Routing:
        """logits [T, E] -> the Routing of T tokens."""
        scored = logits.to(self.score_dtype) if self.score_dtype else logits
        gated = ops.gate(scored, self.k if top_k is None else top_k, score=self.score, normalize=self.normalize)
        aux = {}
        if torch.is_grad_enabled() and logits.requires_grad:
            if self.balance_coef:
                aux["balance"] = self.balance_coef * losses.switch_balance(gated.expert_ids, gated.score_sum)
            if self.z_coef:
                aux["z"] = self.z_coef * losses.router_z(gated.logsumexp)
        return Routing(expert_ids=gated.expert_ids, weights=gated.weights, aux_losses=aux)


class TopKGate(nn.Linear):
    """A bias-free linear router whose state dict is that of a plain `nn.Linear`: `weight` [E, M]."""

    def __init__(self, config: TopK, model_dim: int, num_experts: int, *, device=None, dtype=None) -> None:
        if config.k > num_experts:
            raise InvalidValueError(f"k={config.k} exceeds num_experts={num_experts}")
        super().__init__(model_dim, num_experts, bias=False, device=device, dtype=dtype)
        self.config = config

    def forward(self, x: torch.Tensor, top_k: int | None = None) -> Routing:  # type: ignore[override]
        """x [T, M] -> Routing."""
        return self.config.route(super().forward(x), top_k)
