"""Hierarchical gating: a gate over groups, and one over the experts of each (Shazeer et al. 2017, appendix B)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from tutelx import ops
from tutelx.draws import check_generator, draws_from
from tutelx.errors import InvalidValueError
from tutelx.gates import losses
from tutelx.gates.base import LinearGate, check_coefficients, check_ints, linear, top_score, wide
from tutelx.gates.groups import check_experts, check_groups
from tutelx.types import Capacity, Routing


@dataclass(frozen=True, kw_only=True)
class Hierarchical:
    """y = sum_i sum_j Gp_i(x) * G_ij(x) * E_ij(x) (eq. 12); with one group it is the flat gate.

    Gp is a softmax over the `kept_groups` best groups, G_i one over the best experts inside group i; a token has
    K = kept_groups * k_inside experts. A call's `top_k` is K: it is spread over as many groups as it needs, at least
    min(top_k, kept_groups), and must be a multiple of them.

    num_groups: a divisor of E; expert e is in group e // (E / num_groups).
    noisy: in training, both choices are made with the noise of :class:`NoisyTopK`, as in the paper.
    importance_coef: of the loss over importance_ij = sum_x Gp_i(x) * G_ij(x) (eq. 13).
    group: a process group whose ranks' tokens count as one batch in that loss.
    generator: draws the noise; None takes torch's own.
    """

    num_groups: int
    kept_groups: int = 2
    k_inside: int = 2
    noisy: bool = False
    importance_coef: float = 0.1
    group: torch.distributed.ProcessGroup | None = None
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        check_ints(k_inside=self.k_inside)
        check_groups(self.num_groups, self.kept_groups)
        check_coefficients(importance_coef=self.importance_coef)
        check_generator(self.generator)

    def __deepcopy__(self, memo: dict):
        return self  # a process group cannot be copied, and what a gate draws from is the gate's own

    def build(self, model_dim: int, num_experts: int, *, device=None, dtype=None) -> HierarchicalGate:
        return HierarchicalGate(self, model_dim, num_experts, device=device, dtype=dtype)


class HierarchicalGate(LinearGate):
    """Parameters `group_weight` [G, M] and `weight` [E, M]; with noise, `noise_weight` [G + E, M] too."""

    def __init__(self, config: Hierarchical, model_dim: int, num_experts: int, *, device=None, dtype=None) -> None:
        check_experts(num_experts, config.num_groups, config.kept_groups, config.kept_groups * config.k_inside)
        if config.k_inside > num_experts // config.num_groups:
            raise InvalidValueError(
                f"k_inside={config.k_inside} exceeds the {num_experts // config.num_groups} experts of a group"
            )
        super().__init__(model_dim, num_experts, device=device, dtype=dtype)
        self.config = config
        self.group_weight = nn.Parameter(torch.empty(config.num_groups, model_dim, device=device, dtype=dtype))
        nn.init.kaiming_uniform_(self.group_weight, a=5**0.5)
        self.noise_weight = None
        if config.noisy:
            shape = (config.num_groups + num_experts, model_dim)
            self.noise_weight = nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))
        self.draws = draws_from(config.generator)

    def forward(  # type: ignore[override]
        self,
        x: torch.Tensor,
        top_k: int | None = None,
        *,
        capacity: Capacity | None = None,
        prioritized: bool = False,
    ) -> Routing:
        """x [T, M] -> Routing, best product of both gates first.

        Raises:
            InvalidValueError: a `top_k` that cannot be spread evenly over groups.
        """
        config, tokens, num_groups = self.config, x.shape[0], self.config.num_groups
        size = self.out_features // num_groups
        groups, inside = self._spread(top_k, size)
        both = torch.cat([self.group_weight, self.weight])
        logits = linear(x, both, fp32=self.fp32, training=self.training)
        if self.noise_weight is not None and self.training:
            logits = logits.to(wide(x.dtype))
            std = F.softplus(linear(x, self.noise_weight, fp32=False).to(logits.dtype))
            logits = logits + self.draws.normal(logits.shape, logits) * std
        of_groups, of_experts = logits[:, :num_groups], logits[:, num_groups:]
        primary = ops.gate(of_groups, groups)
        chosen = primary.expert_ids.long()
        # Only the experts of the chosen groups are compared: [T, groups, n].
        candidates = of_experts.reshape(tokens, num_groups, size).gather(1, chosen.unsqueeze(2).expand(-1, -1, size))
        secondary = ops.gate(candidates.reshape(-1, size), inside)
        ids = chosen.unsqueeze(2) * size + secondary.expert_ids.view(tokens, groups, inside)
        weights = primary.weights.unsqueeze(2) * secondary.weights.view(tokens, groups, inside)
        order = weights.detach().flatten(1).sort(dim=1, descending=True, stable=True).indices
        expert_ids = ids.flatten(1).gather(1, order).int()
        weights = weights.flatten(1).gather(1, order)
        aux = {}
        if config.importance_coef and torch.is_grad_enabled() and logits.requires_grad:
            value = losses.importance(expert_ids, weights, self.out_features, group=config.group)
            aux["importance"] = config.importance_coef * value
        priority = None
        if prioritized:
            within = top_score(candidates.reshape(-1, size), secondary, "softmax").view(tokens, groups)[:, 0]
            priority = top_score(of_groups, primary, "softmax") + within
        return Routing(expert_ids=expert_ids, weights=weights, aux_losses=aux, logits=of_experts, priority=priority)

    def _spread(self, top_k: int | None, size: int) -> tuple[int, int]:
        """How many groups, and how many experts in each."""
        config = self.config
        if top_k is None:
            return config.kept_groups, config.k_inside
        check_ints(top_k=top_k)
        groups = max(min(config.kept_groups, top_k), -(-top_k // size))
        if groups > config.num_groups:
            raise InvalidValueError(f"top_k={top_k} exceeds num_experts={self.out_features}")
        if top_k % groups:
            raise InvalidValueError(f"top_k={top_k} cannot be spread evenly over {groups} groups of {size} experts")
        return groups, top_k // groups
