"""Experts that every token visits, beside those that it chooses."""

from __future__ import annotations

import torch
from torch import nn

from tutelx.base import MoEBase
from tutelx.errors import InvalidTypeError
from tutelx.stats import RoutingStats
from tutelx.types import Decision


class _Beside(nn.Module):
    """An MoE layer and a module on the same tokens."""

    def __init__(self, moe: MoEBase, dense: nn.Module, name: str) -> None:
        super().__init__()
        if not isinstance(moe, MoEBase):
            raise InvalidTypeError(f"moe is {type(moe).__name__}, expected tutelx.MoE")
        if not isinstance(dense, nn.Module):
            raise InvalidTypeError(f"{name} is {type(dense).__name__}, expected a module")
        self.moe = moe

    def _router(self, outputs: int) -> nn.Linear:
        like = next(self.moe.parameters())
        return nn.Linear(self.moe.model_dim, outputs, bias=False, device=like.device, dtype=like.dtype)

    @property
    def aux_loss(self) -> torch.Tensor:
        """As of the MoE layer."""
        return self.moe.aux_loss

    @property
    def stats(self) -> RoutingStats | None:
        """As of the MoE layer."""
        return self.moe.stats

    @property
    def last_decision(self) -> Decision | None:
        """As of the MoE layer."""
        return self.moe.last_decision


class SharedExperts(_Beside):
    """y = moe(x) + shared(x): experts that are always on (DeepSeekMoE, eq. 9).

    Ks shared experts of hidden size H are one feed-forward network of hidden size Ks*H.

    Args:
        moe: the routed experts; in DeepSeekMoE with `gate=TopK(k=..., normalize=False)`.
        shared: a module [..., M] -> [..., M].
        gated: the shared output is multiplied with sigmoid(x @ w), w [M] learnt (Qwen2-MoE).
    """

    def __init__(self, moe: MoEBase, shared: nn.Module, *, gated: bool = False) -> None:
        super().__init__(moe, shared, "shared")
        self.shared = shared
        self.shared_gate = self._router(1) if gated else None

    def forward(self, x: torch.Tensor, **call) -> torch.Tensor:
        """x [..., M] -> [..., M]; `call` is handed to the MoE layer."""
        y = self.shared(x)
        if self.shared_gate is not None:
            y = y * self.shared_gate(x).sigmoid()
        return self.moe(x, **call) + y


class ResidualMoE(_Beside):
    """y = mlp(x) + moe(x): an expert corrects a fixed network (DeepSpeed-MoE, section 4.1.2, with top-1 routing).

    Args:
        moe: the routed experts. mlp: a module [..., M] -> [..., M].
        coefficient: instead, y = c_1*mlp(x) + c_2*moe(x) with c = softmax(x @ W), W [M, 2] learnt, as its code offers.
    """

    def __init__(self, moe: MoEBase, mlp: nn.Module, *, coefficient: bool = False) -> None:
        super().__init__(moe, mlp, "mlp")
        self.mlp = mlp
        self.coefficient = self._router(2) if coefficient else None

    def forward(self, x: torch.Tensor, **call) -> torch.Tensor:
        """x [..., M] -> [..., M]; `call` is handed to the MoE layer."""
        dense, routed = self.mlp(x), self.moe(x, **call)
        if self.coefficient is None:
            return dense + routed
        of_dense, of_routed = self.coefficient(x).softmax(dim=-1).unsqueeze(-2).unbind(-1)
        return of_dense * dense + of_routed * routed
