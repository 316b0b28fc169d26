"""From router logits to a Routing, as the layer that is replaced does it. T tokens, E experts, K choices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from tutelx import ops
from tutelx.errors import InvalidValueError
from tutelx.ops.gate import Score
from tutelx.types import Routing

WIDE = (torch.float32, torch.float64)


@dataclass(frozen=True, kw_only=True)
class TopKRule:
    """The K best experts of each token.

    score: softmax over all experts, or a sigmoid for each.
    normalize: a token's K weights are divided by their sum; with softmax, a softmax over the chosen logits.
    score_dtype: what scores are computed in; None for that of the logits.
    ranked: the K best are found among the logits, or among the scores as rounded to their dtype. The two differ where
        rounding makes scores equal.
    """

    k: int
    score: Score
    normalize: bool
    score_dtype: torch.dtype | None = None
    ranked: Literal["logits", "scores"] = "logits"

    def route(self, logits: torch.Tensor, top_k: int | None = None) -> Routing:
        """logits [T, E] -> the Routing of T tokens.

        Raises:
            InvalidValueError, InvalidTypeError: top_k is no int in [1, E].
        """
        k = self.k if top_k is None else top_k
        fused = self.ranked == "logits" and self.score_dtype in (None, logits.dtype)
        if fused and logits.dtype in WIDE:
            gated = ops.gate(logits, k, score=self.score, normalize=self.normalize)
            return Routing(expert_ids=gated.expert_ids, weights=gated.weights)
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= logits.shape[1]:
            raise InvalidValueError(f"top_k={k!r} is outside [1, num_experts={logits.shape[1]}]")
        ids_TK, weights_TK = self._replay(logits, k)
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        return Routing(expert_ids=ids_TK.int(), weights=weights_TK.to(wide))

    def _replay(self, logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's own operations in its own order: where numbers are coarse, ties and rounding are the result."""
        autocast = torch.is_autocast_enabled(logits.device.type)
        dtype = self.score_dtype or (torch.float32 if autocast else logits.dtype)

        def score(values: torch.Tensor) -> torch.Tensor:
            values = values.to(dtype)
            return values.softmax(dim=-1, dtype=dtype) if self.score == "softmax" else values.sigmoid()

        if self.ranked == "scores":
            weights_TK, ids_TK = score(logits).topk(k, dim=-1)
        else:
            chosen_TK, ids_TK = logits.topk(k, dim=-1)
            if self.score == "softmax" and self.normalize:
                return ids_TK, score(chosen_TK)
            weights_TK = score(logits).gather(-1, ids_TK)
        if self.normalize:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        return ids_TK, weights_TK

    def __str__(self) -> str:
        dtype = f" in {str(self.score_dtype).removeprefix('torch.')}" if self.score_dtype else ""
        return f"top-{self.k} of {self.score}{dtype}, {'' if self.normalize else 'not '}normalized"
