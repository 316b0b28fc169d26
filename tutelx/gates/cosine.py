"""The cosine router of Swin Transformer V2 with Mixture of Experts (Tutel, section 5)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from tutelx.errors import InvalidValueError
from tutelx.gates.base import check_at_most, check_coefficients, check_ints, linear, wide
from tutelx.gates.topk import TopK
from tutelx.types import Capacity, Routing


@dataclass(frozen=True, kw_only=True)
class Cosine:
    """logits = cos(projection x, expert's embedding) / temperature, then a top-K softmax normalised over the K chosen.

    k: experts a token.
    dim: what tokens are projected to, 256 in the paper.
    temperature: where the learnt temperature starts. min_temperature: what it never falls below.
    balance_coef, z_coef: of Switch's balance loss and the router z-loss.
    """

    k: int = 2
    dim: int = 256
    temperature: float = 0.5
    min_temperature: float = 0.01
    balance_coef: float = 0.01
    z_coef: float = 0.0

    def __post_init__(self) -> None:
        check_ints(k=self.k, dim=self.dim)
        check_coefficients(balance_coef=self.balance_coef, z_coef=self.z_coef, temperature=self.temperature)
        if not 0 < self.min_temperature <= self.temperature:
            raise InvalidValueError(
                f"min_temperature={self.min_temperature} is outside (0, temperature={self.temperature}]"
            )

    def build(self, model_dim: int, num_experts: int, *, device=None, dtype=None) -> CosineGate:
        return CosineGate(self, model_dim, num_experts, device=device, dtype=dtype)


class CosineGate(nn.Module):
    """Parameters `projection` [256, M], `embedding` [E, 256] and `temperature` [1]."""

    def __init__(self, config: Cosine, model_dim: int, num_experts: int, *, device=None, dtype=None) -> None:
        check_at_most("k", config.k, num_experts)
        super().__init__()
        self.config = config
        self.projection = nn.Parameter(torch.empty(config.dim, model_dim, device=device, dtype=dtype))
        self.embedding = nn.Parameter(torch.empty(num_experts, config.dim, device=device, dtype=dtype))
        self.temperature = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self._rule = TopK(k=config.k, balance_coef=config.balance_coef, z_coef=config.z_coef)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.projection, a=5**0.5)
        nn.init.normal_(self.embedding, std=0.01)
        nn.init.constant_(self.temperature, self.config.temperature)

    def forward(
        self,
        x: torch.Tensor,
        top_k: int | None = None,
        *,
        capacity: Capacity | None = None,
        prioritized: bool = False,
    ) -> Routing:
        """x [T, M] -> Routing. Normalises and compares in float32 (float64 for float64 input)."""
        dtype = wide(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            projected = F.normalize(linear(x.to(self.projection.dtype), self.projection, fp32=True), dim=1)
            cosine = F.linear(projected, F.normalize(self.embedding.to(dtype), dim=1))
            temperature = self.temperature.to(dtype)
            # Held at its least value, the temperature keeps its gradient, or it could never rise again.
            least = temperature.detach().clamp_min(self.config.min_temperature)
            logits = cosine / (temperature + (least - temperature.detach()))
        return self._rule.route(logits, top_k, prioritized=prioritized)
