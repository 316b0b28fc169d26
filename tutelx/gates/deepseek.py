"""The routers of DeepSeek-V2 (group-limited softmax) and DeepSeek-V3 (bias-balanced sigmoid)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tutelx import ops
from tutelx.gates import losses
from tutelx.gates.base import LinearGate, check_coefficients, check_ints, top_score, wide
from tutelx.gates.groups import check_experts, check_groups
from tutelx.gates.statistics import expert_counts
from tutelx.ops.gate import Gated
from tutelx.types import Capacity, Routing


@dataclass(frozen=True, kw_only=True)
class GroupLimited:
    """DeepSeek-V2 (section 2.1.2-3): the K best experts inside the `kept_groups` groups with the best single affinity.

    The affinity is a softmax over all experts; the weight is the affinity times `scale`, not renormalised. A group
    stands for a device: expert e is in group e // (E / num_groups).

    k, num_groups, kept_groups, scale: 6, 8, 3 and 16 in the paper, with 160 experts; a call may ask for another K.
    balance_coef, device_coef, communication_coef: alpha_1..3 of eq. 23, 26 and 29; 0.003, 0.05 and 0.02 in the paper.
    fp32_router: the router computes in float32 whatever the layer's dtype.
    """

    k: int = 6
    num_groups: int = 8
    kept_groups: int = 3
    scale: float = 16.0
    balance_coef: float = 0.003
    device_coef: float = 0.05
    communication_coef: float = 0.02
    fp32_router: bool = True

    def __post_init__(self) -> None:
        check_ints(k=self.k)
        check_groups(self.num_groups, self.kept_groups)
        check_coefficients(
            scale=self.scale,
            balance_coef=self.balance_coef,
            device_coef=self.device_coef,
            communication_coef=self.communication_coef,
        )

    def build(self, model_dim: int, num_experts: int, *, device=None, dtype=None) -> GroupLimitedGate:
        return GroupLimitedGate(self, model_dim, num_experts, device=device, dtype=dtype)


class GroupLimitedGate(LinearGate):
    """Parameter `weight` [E, M]."""

    def __init__(self, config: GroupLimited, model_dim: int, num_experts: int, *, device=None, dtype=None) -> None:
        check_experts(num_experts, config.num_groups, config.kept_groups, config.k)
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
        config = self.config
        k = config.k if top_k is None else top_k
        check_experts(self.out_features, config.num_groups, config.kept_groups, k)
        logits = self.logits(x)
        gated = ops.gate(logits, k, normalize=False, num_groups=config.num_groups, kept_groups=config.kept_groups)
        return Routing(
            expert_ids=gated.expert_ids,
            weights=gated.weights * config.scale,
            aux_losses=self._losses(logits, gated),
            logits=logits,
            priority=top_score(logits, gated, "softmax") if prioritized else None,
        )

    def _losses(self, logits: torch.Tensor, gated: Gated) -> dict[str, torch.Tensor]:
        config = self.config
        coefs = {
            "balance": config.balance_coef,
            "device": config.device_coef,
            "communication": config.communication_coef,
        }
        if not (torch.is_grad_enabled() and logits.requires_grad and any(coefs.values())):
            return {}
        values = losses.device_limited_balances(
            gated.expert_ids, gated.score_sum, config.num_groups, config.kept_groups
        )
        return {name: coef * value for (name, coef), value in zip(coefs.items(), values) if coef}


@dataclass(frozen=True, kw_only=True)
class BiasBalanced:
    """DeepSeek-V3 (section 2.1.2): s = sigmoid(logits); experts are chosen by s + b and weighted by s.

    Weights are s over the sum of the K chosen, times `scale`. The bias b is no parameter: after each optimizer step,
    :meth:`BiasBalancedGate.update_bias` lowers it by `gamma` for experts over the mean load and raises it for those
    under it. A group's score is the sum of its best two s + b; experts outside the best groups cannot be chosen.

    k, num_groups, kept_groups, scale, gamma: 8, 8, 4, 2.5 and 0.001 in the paper, with 256 experts; one group
        limits nothing.
    sequence_coef: alpha of the sequence-wise balance loss (eq. 17), 0.0001 in the paper.
    sequence_length: tokens of a sequence, for that loss; None takes all tokens of a call as one.
    fp32_router: the router computes in float32 whatever the layer's dtype.
    """

    k: int = 8
    num_groups: int = 1
    kept_groups: int = 1
    scale: float = 2.5
    gamma: float = 0.001
    sequence_coef: float = 0.0001
    sequence_length: int | None = None
    fp32_router: bool = True

    def __post_init__(self) -> None:
        check_ints(k=self.k, **({} if self.sequence_length is None else {"sequence_length": self.sequence_length}))
        check_groups(self.num_groups, self.kept_groups)
        check_coefficients(scale=self.scale, gamma=self.gamma, sequence_coef=self.sequence_coef)

    def build(self, model_dim: int, num_experts: int, *, device=None, dtype=None) -> BiasBalancedGate:
        return BiasBalancedGate(self, model_dim, num_experts, device=device, dtype=dtype)


class BiasBalancedGate(LinearGate):
    """Parameter `weight` [E, M], buffer `bias_correction` [E], which stays float32 whatever the layer is cast to.

    counts: [E] int64, choices of the training calls since the last update; not part of the state dict, so save after
    an update.
    """

    bias_correction: torch.Tensor

    def __init__(self, config: BiasBalanced, model_dim: int, num_experts: int, *, device=None, dtype=None) -> None:
        check_experts(num_experts, config.num_groups, config.kept_groups, config.k)
        super().__init__(model_dim, num_experts, fp32=config.fp32_router, device=device, dtype=dtype)
        self.config = config
        self.register_buffer("bias_correction", torch.zeros(num_experts, device=device, dtype=torch.float32))
        # Not a buffer: DistributedDataParallel would overwrite every rank's with those of rank 0.
        self.counts = torch.zeros(num_experts, dtype=torch.int64, device=device)

    def _apply(self, fn, recurse=True):
        bias = self.bias_correction
        super()._apply(fn, recurse)
        # A step of 0.001 vanishes in bfloat16: only the device changes.
        self.bias_correction = torch.zeros_like(self.bias_correction, dtype=torch.float32)
        if not (bias.is_meta or self.bias_correction.is_meta):
            self.bias_correction.copy_(bias)
        return self

    def forward(  # type: ignore[override]
        self,
        x: torch.Tensor,
        top_k: int | None = None,
        *,
        capacity: Capacity | None = None,
        prioritized: bool = False,
    ) -> Routing:
        """x [T, M] -> Routing. Training calls with gradients count their choices for :meth:`update_bias`."""
        config = self.config
        k = config.k if top_k is None else top_k
        check_experts(self.out_features, config.num_groups, config.kept_groups, k)
        logits = self.logits(x)
        gated = ops.gate(
            logits,
            k,
            score="sigmoid",
            bias=self.bias_correction,
            num_groups=config.num_groups,
            kept_groups=config.kept_groups,
            best_of_group=2,
        )
        aux = {}
        if torch.is_grad_enabled() and logits.requires_grad:
            if self.training and not _runs_again():
                self._count(gated.expert_ids)
            if config.sequence_coef:
                scores = logits.to(wide(logits.dtype)).sigmoid()
                value = losses.sequence_balance(gated.expert_ids, scores, config.sequence_length)
                aux["sequence"] = config.sequence_coef * value
        return Routing(
            expert_ids=gated.expert_ids,
            weights=gated.weights * config.scale,
            aux_losses=aux,
            logits=logits,
            # The best score of all experts: of the chosen ones the first is best with its bias only.
            priority=logits.detach().amax(dim=1).to(gated.weights.dtype) if prioritized else None,
        )

    def _count(self, expert_ids: torch.Tensor) -> None:
        with torch.no_grad():
            self.counts = self.counts.to(expert_ids.device) + expert_counts(expert_ids, self.out_features)

    def update_bias(self, group: Any = None) -> None:
        """b += gamma * sign(mean load - load), and counts anew. `group`: loads are those of all its ranks together."""
        update_biases([self], group=group)


def update_biases(modules: nn.Module | Iterable[nn.Module], *, group: Any = None) -> None:
    """:meth:`BiasBalancedGate.update_bias` of every such gate in a model, or among modules, with one reduction.

    Call it on every rank of `group` after each optimizer step; the model must be the same on all of them.
    """
    each = modules.modules() if isinstance(modules, nn.Module) else modules
    gates = [module for module in each if isinstance(module, BiasBalancedGate)]
    if not gates:
        return
    with torch.no_grad():
        counts = torch.cat([gate.counts.to(gate.bias_correction.device) for gate in gates])
        if group is not None:
            dist.all_reduce(counts, group=group)
        for gate, mine in zip(gates, counts.split([gate.out_features for gate in gates])):
            # E * (mean - load) in whole numbers: at exactly the mean nothing changes.
            gate.bias_correction += gate.config.gamma * torch.sign(mine.sum() - mine * mine.shape[0])
            gate.counts = torch.zeros_like(mine)


def _runs_again() -> bool:
    """Inside backward: activation checkpointing repeats a call that has been counted."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
