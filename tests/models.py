"""MoE layers as people write them by hand: what `tutelx.wrap` is for."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn


class SwiGLU(nn.Module):
    """Llama's feed-forward network."""

    def __init__(self, model_dim: int, hidden_dim: int, bias: bool = False) -> None:
        super().__init__()
        self.w1 = nn.Linear(model_dim, hidden_dim, bias=bias)
        self.w2 = nn.Linear(hidden_dim, model_dim, bias=bias)
        self.w3 = nn.Linear(model_dim, hidden_dim, bias=bias)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class FFN(nn.Module):
    """A two-layer network; layers named after nothing in particular."""

    def __init__(self, model_dim: int, hidden_dim: int, activation: nn.Module | None = None, bias: bool = True) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(model_dim, hidden_dim, bias=bias),
            nn.GELU() if activation is None else activation,
            nn.Linear(hidden_dim, model_dim, bias=bias),
        )

    def forward(self, x):
        return self.net(x)


class MoE(nn.Module):
    """Mistral's layer: a softmax over the chosen logits. Experts without tokens are called with none."""

    def __init__(self, model_dim=16, hidden_dim=24, num_experts=4, top_k=2, expert=SwiGLU, router_bias=False) -> None:
        super().__init__()
        self.gate = nn.Linear(model_dim, num_experts, bias=router_bias)
        self.experts = nn.ModuleList(expert(model_dim, hidden_dim) for _ in range(num_experts))
        self.args = SimpleNamespace(num_experts=num_experts, num_experts_per_tok=top_k)

    def choose(self, logits, k):
        chosen, ids = torch.topk(logits, k)
        return F.softmax(chosen, dim=-1), ids

    def combine(self, x, weights, ids):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, nth = torch.where(ids == e)
            out[token] += weights[token, nth, None] * expert(x[token])
        return out

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        weights, ids = self.choose(self.gate(flat), self.args.num_experts_per_tok)
        return self.combine(flat, weights.to(x.dtype), ids).reshape(x.shape)


class Unnormalized(MoE):
    """Switch and Qwen style: the probabilities of the chosen. Experts without tokens are skipped."""

    def choose(self, logits, k):
        return torch.topk(F.softmax(logits, dim=-1), k)

    def combine(self, x, weights, ids):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, nth = torch.where(ids == e)
            if token.numel() == 0:
                continue
            out = out.index_add(0, token, weights[token, nth, None] * expert(x[token]))
        return out


class Renormalized(Unnormalized):
    """Mixtral style: the probabilities of the chosen, divided by their sum."""

    def choose(self, logits, k):
        weights, ids = torch.topk(F.softmax(logits, dim=-1), k)
        return weights / weights.sum(dim=-1, keepdim=True), ids


class Sigmoid(MoE):
    """Llama 4 and DeepSeek-V3 style scores."""

    def choose(self, logits, k):
        return torch.topk(torch.sigmoid(logits), k)


class Float32Chosen(MoE):
    """As published: the softmax is in float32, whatever the layer is in."""

    def choose(self, logits, k):
        chosen, ids = torch.topk(logits, k)
        return F.softmax(chosen, dim=1, dtype=torch.float), ids


class Float32Renormalized(Unnormalized):
    """Mixtral's own code: probabilities in float32, then the choice, then the division."""

    def choose(self, logits, k):
        weights, ids = torch.topk(F.softmax(logits, dim=1, dtype=torch.float), k, dim=-1)
        return weights / weights.sum(dim=-1, keepdim=True), ids


class WithLogits(Renormalized):
    """Returns the router's logits too, for a loss elsewhere."""

    def forward(self, x):
        return super().forward(x), self.gate(x.reshape(-1, x.shape[-1]))


class Block(nn.Module):
    """A pre-norm residual block around one layer."""

    def __init__(self, model_dim: int, moe: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(model_dim)
        self.moe = moe

    def forward(self, x):
        return x + self.moe(self.norm(x))


def model(*layers: nn.Module, model_dim: int = 16) -> nn.Sequential:
    return nn.Sequential(*(Block(model_dim, layer) for layer in layers))
