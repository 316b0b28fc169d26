"""Expert choice: experts choose tokens (Zhou et al. 2022)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from tutelx import ops
from tutelx.errors import InvalidValueError
from tutelx.gates.base import LinearGate, check_at_most, check_ints, row_limit, wide
from tutelx.gates.statistics import expert_counts
from tutelx.types import Capacity, Routing


@dataclass(frozen=True, kw_only=True)
class ExpertChoice:
    """Each expert takes the C = K*T/E tokens that want it most (eq. 1-2): no overflow, and 0..E experts a token.

    The affinity is a softmax over experts, and the weight is the affinity itself. A fixed or bounded capacity of the
    layer with factor f makes C = f*K*T/E. Batch-prioritised routing changes nothing, as no row is contested. The choice
    looks at the whole batch, later tokens of a sequence included: not for autoregressive generation. Over ranks, each
    expert chooses among the tokens of each rank.

    On CPU `ops.gate` chooses, along tokens instead of experts. Elsewhere a stable sort does: the compiled gate has a
    limit of entries there that a batch exceeds.

    k: K, the experts a token has on average (the paper's capacity factor c).
    fp32_router: the router computes in float32 whatever the layer's dtype.
    """

    k: int = 2
    fp32_router: bool = False

    def __post_init__(self) -> None:
        check_ints(k=self.k)

    def build(self, model_dim: int, num_experts: int, *, device=None, dtype=None) -> ExpertChoiceGate:
        return ExpertChoiceGate(self, model_dim, num_experts, device=device, dtype=dtype)


class ExpertChoiceGate(LinearGate):
    """Parameter `weight` [E, M]."""

    def __init__(self, config: ExpertChoice, model_dim: int, num_experts: int, *, device=None, dtype=None) -> None:
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
        """x [T, M] -> Routing of as many choices as the most wanted token has, in the order of experts.

        Waits for the device: how many experts a token gets is known afterwards only.

        Raises:
            InvalidValueError: top_k outside [1, E], or logits that are not finite.
        """
        logits = self.logits(x)
        tokens, num_experts = logits.shape
        k = self.config.k if top_k is None else top_k
        check_ints(top_k=k)
        check_at_most("top_k", k, num_experts)
        scores = logits.to(wide(logits.dtype)).softmax(dim=1)
        _check_finite(logits, scores)
        rows = row_limit(capacity, tokens=tokens, top_k=k, num_experts=num_experts)
        if rows is None:
            rows = max(1, math.ceil(k * tokens / num_experts))
        rows = min(rows, tokens)
        if rows == tokens:  # every expert takes every token
            expert_ids = torch.arange(num_experts, dtype=torch.int32, device=logits.device).expand(tokens, -1)
            weights = scores
        else:
            expert_ids = _by_token(_best_tokens(scores.detach(), rows), tokens)
            weights = scores.gather(1, expert_ids.clamp_min(0).long()).masked_fill(expert_ids < 0, 0.0)
        return Routing(expert_ids=expert_ids, weights=weights, logits=logits, top_k=k, capacity=max(1, rows))


def _best_tokens(scores: torch.Tensor, rows: int) -> torch.Tensor:
    """[E, C], each expert's best tokens, best first; of equal ones the earlier."""
    if scores.device.type == "cpu":
        return ops.gate(scores.T, rows, normalize=False).expert_ids
    return scores.T.sort(dim=1, descending=True, stable=True).indices[:, :rows]


def _by_token(chosen: torch.Tensor, tokens: int) -> torch.Tensor:
    """The tokens [E, C] of each expert -> the experts [T, K] of each token, ascending, then -1."""
    rows = chosen.shape[1]
    if chosen.device.type == "cpu":
        # As many experts as there are tokens, with a row for each of their slots of [E, C].
        map = ops.route(chosen.reshape(1, -1), tokens, layout="padded")
        return map.source.view(tokens, -1).div(rows, rounding_mode="floor")
    token, slots = chosen.reshape(-1).sort(stable=True)
    counts = expert_counts(token, tokens)
    most = int(counts.max())
    expert_ids = torch.full((tokens, most), -1, dtype=torch.int32, device=chosen.device)
    taken = torch.arange(most, device=chosen.device) < counts.unsqueeze(1)
    return expert_ids.masked_scatter_(taken, (slots // rows).int())


def _check_finite(logits: torch.Tensor, scores: torch.Tensor) -> None:
    if logits.device.type == "cpu" and not math.isfinite(scores.detach().sum().item()):
        token = int(scores.isfinite().all(dim=1).int().argmin())
        raise InvalidValueError(
            f"logits[{token}] is {logits[token].tolist()}: NaN, +inf, or no finite entry among its {logits.shape[1]}"
            " experts"
        )
