"""A script's gate for one call, as the layer asks of its gates. T tokens, M model dim, E experts, K choices a token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from tutelx import ops
from tutelx.errors import InvalidTypeError, InvalidValueError
from tutelx.gates.base import top_score
from tutelx.gates.losses import switch_balance
from tutelx.integrations.tutel import counts
from tutelx.integrations.tutel.losses import load_importance_loss
from tutelx.types import Capacity, Routing


@dataclass(frozen=True, kw_only=True)
class Router:
    """Logits -> noise -> softmax top-K -> weights, loss and capacity.

    module: tokens [T, M] -> logits [T, E].
    noise: standard deviation of what is added to the logits in training, times E.
    normalize: the weights of two or more choices are divided by their sum; that of one choice never is.
    gshard: the loss is E * sum f_i P_i, else the mean of those of importance and load.
    """

    module: nn.Module
    num_experts: int
    noise: float
    normalize: bool
    gshard: bool
    training: bool
    factor: float
    alignment: int

    def __call__(self, x: torch.Tensor, top_k: int | None = None, *, capacity: Capacity, prioritized: bool) -> Routing:
        assert top_k is not None
        with torch.autocast(x.device.type, enabled=False):
            logits = self._logits(x)
        noisy = logits
        if self.training and self.noise > 0:
            noisy = logits + self.noise * torch.randn_like(logits) / self.num_experts
        gated = ops.gate(noisy, top_k, normalize=self.normalize and top_k > 1)
        if self.gshard:
            loss = switch_balance(gated.expert_ids, gated.score_sum).to(logits.dtype)
        else:
            chosen = noisy.gather(1, gated.expert_ids.long())
            loss = load_importance_loss(F.softmax(logits, dim=1), chosen, self.num_experts, self.noise)
        return Routing(
            expert_ids=gated.expert_ids,
            weights=gated.weights,
            aux_losses={"l_aux": loss},
            logits=logits,
            priority=top_score(noisy, gated, "softmax") if prioritized else None,
            capacity=counts.rows(
                self.factor,
                tokens=x.shape[0],
                top_k=top_k,
                num_experts=self.num_experts,
                alignment=self.alignment,
            ),
        )

    def _logits(self, x_TM: torch.Tensor) -> torch.Tensor:
        logits: Any = self.module(x_TM)
        name = type(self.module).__name__
        if not isinstance(logits, torch.Tensor):
            raise InvalidTypeError(f"{name} returned {type(logits).__name__}, expected logits")
        expected = (x_TM.shape[0], self.num_experts)
        if tuple(logits.shape) != expected:
            raise InvalidValueError(f"{name} returned logits {tuple(logits.shape)}, expected [T, E]={expected}")
        return logits
