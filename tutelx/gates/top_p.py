"""Top-p routing: as many experts as a token needs (Huang et al. 2024, eq. 3-4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tutelx import ops
from tutelx.errors import InvalidValueError
from tutelx.gates.base import LinearGate, balance_and_z, check_at_most, check_coefficients, check_ints, top_score
from tutelx.types import Capacity, Routing


@dataclass(frozen=True, kw_only=True)
class TopP:
    """Each token takes the smallest set of experts whose probabilities add up to p, at most K of them.

    p: the threshold, 0.4 in the paper.
    k: K, the most experts a token may have; None: E. The capacity is a multiple of it.
    normalize: weights are divided by their sum; without it they are the probabilities, as in the paper.
    balance_coef, z_coef: of Switch's balance loss and the router z-loss.
    """

    p: float = 0.4
    k: int | None = None
    normalize: bool = False
    balance_coef: float = 0.01
    z_coef: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.p, bool) or not isinstance(self.p, (int, float)) or not 0 < self.p <= 1:
            raise InvalidValueError(f"p={self.p!r} is outside (0, 1]")
        if self.k is not None:
            check_ints(k=self.k)
        check_coefficients(balance_coef=self.balance_coef, z_coef=self.z_coef)

    def build(self, model_dim: int, num_experts: int, *, device=None, dtype=None) -> TopPGate:
        return TopPGate(self, model_dim, num_experts, device=device, dtype=dtype)


class TopPGate(LinearGate):
    """Parameter `weight` [E, M]."""

    def __init__(self, config: TopP, model_dim: int, num_experts: int, *, device=None, dtype=None) -> None:
        check_at_most("k", config.k or 1, num_experts)
        super().__init__(model_dim, num_experts, device=device, dtype=dtype)
        self.config = config

    def forward(  # type: ignore[override]
        self,
        x: torch.Tensor,
        top_k: int | None = None,
        *,
        capacity: Capacity | None = None,
        prioritized: bool = False,
    ) -> Routing:
        """x [T, M] -> Routing; `top_k` is the most experts of this call."""
        config = self.config
        logits = self.logits(x)
        most = (config.k or logits.shape[1]) if top_k is None else top_k
        gated = ops.gate(logits, most, normalize=False)
        weights = gated.weights
        scores = weights.detach()
        # An expert belongs to the set if those before it do not reach p yet; the first always does.
        before = torch.cat([torch.zeros_like(scores[:, :1]), scores.cumsum(dim=1)[:, :-1]], dim=1)
        taken = before < config.p
        expert_ids = torch.where(taken, gated.expert_ids, -1)
        weights = weights.masked_fill(~taken, 0.0)
        if config.normalize:
            weights = weights / weights.sum(dim=1, keepdim=True)
        return Routing(
            expert_ids=expert_ids,
            weights=weights,
            aux_losses=balance_and_z(logits, gated, balance_coef=config.balance_coef, z_coef=config.z_coef),
            logits=logits,
            priority=top_score(logits, gated, "softmax") if prioritized else None,
        )
