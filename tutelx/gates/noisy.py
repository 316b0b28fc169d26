"""Noisy top-K gating of the sparsely-gated Mixture-of-Experts layer (Shazeer et al. 2017)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from tutelx import ops
from tutelx.draws import check_generator, draws_from
from tutelx.gates import losses
from tutelx.gates.base import LinearGate, check_at_most, check_coefficients, check_ints, linear, top_score, wide
from tutelx.gates.statistics import expert_sums, over_ranks
from tutelx.types import Capacity, Routing


@dataclass(frozen=True, kw_only=True)
class NoisyTopK:
    """h_i = (x Wg)_i + N(0, 1) * softplus((x Wn)_i); weights are a softmax over the K best h (eq. 3-5).

    The noise is there in training only. Both matrices start at 0, so that the load is even at the start.

    k: experts a token. With K = 1 every weight is 1 and the router learns from its losses alone; the paper has K > 1.
    importance_coef, load_coef: of the losses of eq. 7 and 11; the paper's value is 0.1 for both.
    group: a process group whose ranks' tokens count as one batch in both losses, as in the paper.
    generator: draws the noise; None takes torch's own.
    """

    k: int = 2
    importance_coef: float = 0.1
    load_coef: float = 0.1
    group: torch.distributed.ProcessGroup | None = None
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        check_ints(k=self.k)
        check_coefficients(importance_coef=self.importance_coef, load_coef=self.load_coef)
        check_generator(self.generator)

    def __deepcopy__(self, memo: dict):
        return self  # a process group cannot be copied, and what a gate draws from is the gate's own

    def build(self, model_dim: int, num_experts: int, *, device=None, dtype=None) -> NoisyTopKGate:
        return NoisyTopKGate(self, model_dim, num_experts, device=device, dtype=dtype)


class NoisyTopKGate(LinearGate):
    """Parameters `weight` and `noise_weight` [E, M]."""

    def __init__(self, config: NoisyTopK, model_dim: int, num_experts: int, *, device=None, dtype=None) -> None:
        check_at_most("k", config.k, num_experts)
        super().__init__(model_dim, num_experts, device=device, dtype=dtype)
        self.noise_weight = nn.Parameter(torch.empty_like(self.weight))
        self.config = config
        self.draws = draws_from(config.generator)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        if hasattr(self, "noise_weight"):
            nn.init.zeros_(self.noise_weight)

    def forward(  # type: ignore[override]
        self,
        x: torch.Tensor,
        top_k: int | None = None,
        *,
        capacity: Capacity | None = None,
        prioritized: bool = False,
    ) -> Routing:
        """x [T, M] -> Routing."""
        config = self.config
        k = config.k if top_k is None else top_k
        clean = self.logits(x).to(wide(x.dtype))
        noisy = clean
        if self.training:
            std = F.softplus(linear(x, self.noise_weight, fp32=False).to(clean.dtype))
            noisy = clean + self.draws.normal(clean.shape, clean) * std
        gated = ops.gate(noisy, k)
        aux: dict[str, torch.Tensor] = {}
        if self.training and torch.is_grad_enabled():
            sums = {}
            if config.importance_coef:
                sums["importance"] = expert_sums(gated.expert_ids, gated.weights, clean.shape[1])
            if config.load_coef:
                sums["load"] = losses.smooth_load(clean, noisy, std, k)
            if sums:
                values = losses.cv_squared(torch.stack(over_ranks(config.group, *sums.values()))).unbind()
                coefs = {"importance": config.importance_coef, "load": config.load_coef}
                aux = {name: coefs[name] * value for name, value in zip(sums, values)}
        return Routing(
            expert_ids=gated.expert_ids,
            weights=gated.weights,
            aux_losses=aux,
            logits=noisy,
            priority=top_score(noisy, gated, "softmax") if prioritized else None,
        )
