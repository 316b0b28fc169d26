"""The Switch Transformers router."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from tutelx import ops
from tutelx.draws import check_generator, draws_from
from tutelx.gates.base import (
    LinearGate,
    balance_and_z,
    by_priority,
    check_at_most,
    check_coefficients,
    check_ints,
    row_limit,
    top_score,
    wide,
)
from tutelx.gates.statistics import expert_counts
from tutelx.types import Capacity, Routing


@dataclass(frozen=True, kw_only=True)
class Switch:
    """One expert a token, weighted with the probability that it won with (Switch Transformers, section 2).

    An expert keeps exactly as many tokens as the layer's capacity says. The router computes in float32; what is sent
    keeps its dtype. Expert dropout is the layer's `expert_dropout`.

    k: experts a token, 1 in the paper.
    jitter: in training the router's input is multiplied with U(1 - jitter, 1 + jitter).
    init_scale: s of the router's start, a normal of standard deviation sqrt(s/M) cut at twice that.
    reroute: no-token-left-behind: how often tokens over the capacity are sent on to their next best expert; a token
        that is still over it is dropped. 0: not at all; E - 1 tries every expert.
    balance_coef: alpha of eq. 4. z_coef: of the router z-loss.
    fp32_router: the router computes in float32 whatever the layer's dtype.
    generator: draws the jitter; None takes torch's own.
    """

    k: int = 1
    jitter: float = 0.01
    init_scale: float = 0.1
    reroute: int = 0
    balance_coef: float = 0.01
    z_coef: float = 0.0
    fp32_router: bool = True
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        check_ints(k=self.k, **({"reroute": self.reroute} if self.reroute else {}))
        check_coefficients(
            jitter=self.jitter, init_scale=self.init_scale, balance_coef=self.balance_coef, z_coef=self.z_coef
        )
        check_generator(self.generator)

    def build(self, model_dim: int, num_experts: int, *, device=None, dtype=None) -> SwitchGate:
        return SwitchGate(self, model_dim, num_experts, device=device, dtype=dtype)


class SwitchGate(LinearGate):
    """Parameter `weight` [E, M]."""

    def __init__(self, config: Switch, model_dim: int, num_experts: int, *, device=None, dtype=None) -> None:
        check_at_most("k", config.k, num_experts)
        self.config = config  # first: nn.Linear initialises itself with it
        super().__init__(model_dim, num_experts, fp32=config.fp32_router, device=device, dtype=dtype)
        self.draws = draws_from(config.generator)

    def reset_parameters(self) -> None:
        std = math.sqrt(self.config.init_scale / self.in_features)
        nn.init.trunc_normal_(self.weight, std=std, a=-2 * std, b=2 * std)

    def forward(  # type: ignore[override]
        self,
        x: torch.Tensor,
        top_k: int | None = None,
        *,
        capacity: Capacity | None = None,
        prioritized: bool = False,
    ) -> Routing:
        """x [T, M] -> Routing. Rerouting needs the capacity; what then still exceeds it is dropped here."""
        config = self.config
        k = config.k if top_k is None else top_k
        if self.training and config.jitter:
            dtype = wide(x.dtype) if self.fp32 else x.dtype
            factor = 1 + config.jitter * (2 * self.draws.uniform(x.shape, x) - 1)
            x = x.to(dtype) * factor.to(dtype)
        logits = self.logits(x)
        gated = ops.gate(logits, k, normalize=False)
        priority = top_score(logits, gated, "softmax") if prioritized else None
        routing = {"expert_ids": gated.expert_ids, "weights": gated.weights}
        limit = row_limit(capacity, tokens=x.shape[0], top_k=k, num_experts=logits.shape[1])
        if config.reroute and limit is not None:
            routing = self._reroute(logits, k, limit, priority)
            routing["requested"] = expert_counts(gated.expert_ids, logits.shape[1])
        aux = balance_and_z(logits, gated, balance_coef=config.balance_coef, z_coef=config.z_coef)
        return Routing(**routing, aux_losses=aux, logits=logits, priority=priority)  # type: ignore[arg-type]

    def _reroute(self, logits: torch.Tensor, k: int, limit: int, priority: torch.Tensor | None) -> dict:
        """Round by round, choices over the capacity take the token's next best expert that it has not tried.

        Places given in earlier rounds stay. Waits for the device once a round.
        """
        num_experts = logits.shape[1]
        ranked = ops.gate(logits, min(num_experts, k + self.config.reroute), normalize=False)
        order = None if priority is None else by_priority(priority)
        # Which of its ranked experts each choice has: [T, K], -1 for none.
        place = torch.arange(k, device=logits.device).expand(logits.shape[0], k)
        settled = torch.full_like(place, -1)
        tried = torch.full_like(place[:, :1], k)
        while True:
            both = torch.cat([_pick(ranked.expert_ids, settled), _pick(ranked.expert_ids, place)], dim=1)
            dest = ops.route(both, num_experts, limit, layout="ragged", order=order).dest
            settled = torch.where(dest[:, k:] >= 0, place, settled)
            over = settled < 0
            place = torch.where(over, tried + over.cumsum(dim=1) - 1, -1)
            place = place.masked_fill(place >= ranked.expert_ids.shape[1], -1)
            tried = tried + over.sum(dim=1, keepdim=True)
            if not bool((place >= 0).any()):
                break
        weights = ranked.weights.gather(1, settled.clamp_min(0))
        return {"expert_ids": _pick(ranked.expert_ids, settled), "weights": weights, "capacity": limit}


def _pick(ranked_ids: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """The ranked expert at each place [T, K], -1 where there is none."""
    return torch.where(place >= 0, ranked_ids.gather(1, place.clamp_min(0)), -1)
