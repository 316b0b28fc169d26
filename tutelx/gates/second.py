"""Gates that send a token's second expert by chance: GShard's and ST-MoE's top-2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from tutelx import ops
from tutelx.draws import check_generator, draws_from
from tutelx.errors import InvalidValueError
from tutelx.gates import losses
from tutelx.gates.base import (
    LinearGate,
    balance_and_z,
    by_priority,
    check_at_most,
    check_coefficients,
    check_ints,
    row_limit,
    top_score,
)
from tutelx.gates.statistics import expert_counts
from tutelx.ops.gate import Gated
from tutelx.types import Capacity, Routing

SecondExpert = Literal["random", "always"]


@dataclass(frozen=True, kw_only=True)
class GShardTop2:
    """GShard's gate (algorithm 1): weights g1/(g1+g2) and g2/(g1+g2), never normalised again.

    The second expert is sent if 2*g2 > U(0, 1) and there is room; a choice that is not sent still takes a place in its
    expert's count, so that a fixed or bounded capacity fills up as in the paper. A call may ask for another K: all
    choices but the first are then treated as the second.

    group_size: S, tokens of a local group that has a capacity of its own; the last group may be shorter. None: all.
    second, second_in_evaluation: "random" as above, or "always" sent.
    balance_coef: of the loss of algorithm 1, the mean over groups.
    generator: draws U; None takes torch's own.
    """

    group_size: int | None = None
    second: SecondExpert = "random"
    second_in_evaluation: SecondExpert = "random"
    balance_coef: float = 0.01
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if self.group_size is not None:
            check_ints(group_size=self.group_size)
        check_second(second=self.second, second_in_evaluation=self.second_in_evaluation)
        check_coefficients(balance_coef=self.balance_coef)
        check_generator(self.generator)

    def build(self, model_dim: int, num_experts: int, *, device=None, dtype=None) -> GShardTop2Gate:
        return GShardTop2Gate(self, model_dim, num_experts, device=device, dtype=dtype)


class GShardTop2Gate(LinearGate):
    """Parameter `weight` [E, M]."""

    def __init__(self, config: GShardTop2, model_dim: int, num_experts: int, *, device=None, dtype=None) -> None:
        check_at_most("k", 2, num_experts)
        super().__init__(model_dim, num_experts, device=device, dtype=dtype)
        self.config = config
        self.draws = draws_from(config.generator)

    def forward(  # type: ignore[override]
        self,
        x: torch.Tensor,
        top_k: int | None = None,
        *,
        capacity: Capacity | None = None,
        prioritized: bool = False,
    ) -> Routing:
        """x [T, M] -> Routing. With a capacity, what exceeds it is dropped here, group by group."""
        config = self.config
        logits = self.logits(x)
        gated = ops.gate(logits, 2 if top_k is None else top_k)
        priority = top_score(logits, gated, "softmax") if prioritized else None
        ids, weights = gated.expert_ids, gated.weights
        sent = torch.ones_like(ids, dtype=torch.bool)
        if ids.shape[1] > 1 and (config.second if self.training else config.second_in_evaluation) == "random":
            second = weights.detach()[:, 1:]
            sent[:, 1:] = 2 * second > self.draws.uniform(second.shape, second)
        wanted = torch.where(sent, ids, -1)
        kept, limit = self._with_room(ids, capacity, priority)
        return Routing(
            expert_ids=wanted if kept is None else torch.where(kept, wanted, -1),
            weights=weights,
            aux_losses=self._losses(logits, gated),
            logits=logits,
            priority=priority,
            capacity=limit,
            requested=None if kept is None else expert_counts(wanted, logits.shape[1]),
        )

    def _with_room(
        self, ids: torch.Tensor, capacity: Capacity | None, priority: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, int | None]:
        """[T, K], the choices that come before their expert is full in their group, and the rows of all groups."""
        (tokens, top_k), num_experts = ids.shape, self.out_features
        size = min(self.config.group_size or tokens, tokens)
        limit = row_limit(capacity, tokens=size, top_k=top_k, num_experts=num_experts)
        if limit is None or tokens == 0:
            return None, None
        groups = -(-tokens // size)
        # Expert e of group g counts as expert g*E + e: one pass for all groups.
        shift = torch.arange(tokens, device=ids.device).div(size, rounding_mode="floor").unsqueeze(1) * num_experts
        order = None if priority is None else by_priority(priority)
        dest = ops.route(ids + shift, groups * num_experts, limit, layout="ragged", order=order).dest
        return dest >= 0, groups * limit

    def _losses(self, logits: torch.Tensor, gated: Gated) -> dict[str, torch.Tensor]:
        config, tokens = self.config, logits.shape[0]
        if not (config.balance_coef and torch.is_grad_enabled() and logits.requires_grad):
            return {}
        if config.group_size is None or config.group_size >= tokens:
            value = losses.gshard_balance(gated.expert_ids, gated.score_sum)
        else:
            sizes = gated.expert_ids.split(config.group_size)
            scores = logits.to(gated.weights.dtype).softmax(dim=1).split(config.group_size)
            each = [losses.gshard_balance(ids, score.sum(dim=0)) for ids, score in zip(sizes, scores)]
            value = torch.stack(each).mean()
        return {"balance": config.balance_coef * value}


@dataclass(frozen=True, kw_only=True)
class STMoE:
    """ST-MoE's top-2: the second expert is sent if g2/g1 > threshold, else with probability g2/(threshold*g1).

    Weights are g1/(g1+g2) and g2/(g1+g2), whether the second is sent or not; one that is not sent takes no place. The
    paper's capacity is `MoE(capacity=Capacity.fixed(1.25), eval_capacity=Capacity.fixed(2.0))`. A call may ask for
    another K: all choices but the first are then treated as the second.

    threshold: 0.2 in the paper.
    second, second_in_evaluation: "random" as above, or "always" sent.
    balance_coef, z_coef: of Switch's balance loss and the router z-loss (section 3.2).
    fp32_router: the router computes in float32 whatever the layer's dtype.
    generator: draws the chance; None takes torch's own.
    """

    threshold: float = 0.2
    second: SecondExpert = "random"
    second_in_evaluation: SecondExpert = "random"
    balance_coef: float = 0.01
    z_coef: float = 0.001
    fp32_router: bool = True
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        check_coefficients(threshold=self.threshold, balance_coef=self.balance_coef, z_coef=self.z_coef)
        check_second(second=self.second, second_in_evaluation=self.second_in_evaluation)
        check_generator(self.generator)

    def build(self, model_dim: int, num_experts: int, *, device=None, dtype=None) -> STMoEGate:
        return STMoEGate(self, model_dim, num_experts, device=device, dtype=dtype)


class STMoEGate(LinearGate):
    """Parameter `weight` [E, M]."""

    def __init__(self, config: STMoE, model_dim: int, num_experts: int, *, device=None, dtype=None) -> None:
        check_at_most("k", 2, num_experts)
        super().__init__(model_dim, num_experts, fp32=config.fp32_router, device=device, dtype=dtype)
        self.config = config
        self.draws = draws_from(config.generator)

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
        logits = self.logits(x)
        gated = ops.gate(logits, 2 if top_k is None else top_k)
        ids, weights = gated.expert_ids, gated.weights
        if ids.shape[1] > 1 and (config.second if self.training else config.second_in_evaluation) == "random":
            first, second = weights.detach()[:, :1], weights.detach()[:, 1:]
            # One comparison for both cases: U < 1, so a ratio over the threshold always passes.
            sent = second > config.threshold * first * self.draws.uniform(second.shape, second)
            ids = torch.cat([ids[:, :1], torch.where(sent, ids[:, 1:], -1)], dim=1)
        return Routing(
            expert_ids=ids,
            weights=weights,
            aux_losses=balance_and_z(logits, gated, balance_coef=config.balance_coef, z_coef=config.z_coef),
            logits=logits,
            priority=top_score(logits, gated, "softmax") if prioritized else None,
        )


def check_second(**values: str) -> None:
    for name, value in values.items():
        if value not in ("random", "always"):
            raise InvalidValueError(f"{name}={value!r} is neither 'random' nor 'always'")
