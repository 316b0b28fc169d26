"""A Llama-style byte-level language model with Mixture-of-Experts layers, as one writes it by hand.

Nothing here knows tutelx: this is the code that somebody already has. Shapes: B sequences of S bytes, D model dim.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from tutelx.demo.settings import Settings

VOCABULARY = 256  # bytes


class FeedForward(nn.Module):
    """One expert: w2(silu(w1(x)) * w3(x))."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class MoeLayer(nn.Module):
    """The classic loop: every expert picks its tokens out, and adds what it makes of them."""

    def __init__(self, dim: int, hidden: int, num_experts: int, num_experts_per_tok: int) -> None:
        super().__init__()
        self.num_experts_per_tok = num_experts_per_tok
        self.gate = nn.Linear(dim, num_experts, bias=False)
        self.experts = nn.ModuleList(FeedForward(dim, hidden) for _ in range(num_experts))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inputs = x.reshape(-1, x.shape[-1])
        logits, selected = torch.topk(self.gate(inputs), self.num_experts_per_tok)
        weights = F.softmax(logits, dim=-1)
        results = torch.zeros_like(inputs)
        for i, expert in enumerate(self.experts):
            batch_idx, nth = torch.where(selected == i)
            results[batch_idx] += weights[batch_idx, nth, None] * expert(inputs[batch_idx])
        return results.reshape(x.shape)


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.wqkv = nn.Linear(dim, 3 * dim, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        B, S, D = x.shape
        q, k, v = self.wqkv(x).view(B, S, 3, -1, self.head_dim).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(_rotate(q, cos, sin), _rotate(k, cos, sin), v, is_causal=True)
        return self.wo(mixed.transpose(1, 2).reshape(B, S, D))


class Block(nn.Module):
    def __init__(self, settings: Settings, head_dim: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(settings.dim, eps=1e-5)
        self.attention = Attention(settings.dim, head_dim)
        self.ffn_norm = nn.RMSNorm(settings.dim, eps=1e-5)
        self.moe = MoeLayer(settings.dim, settings.hidden, settings.experts, settings.top_k)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.moe(self.ffn_norm(x))


class LanguageModel(nn.Module):
    """bytes [B, S] -> logits [B, S, 256] of the byte that follows each."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.head_dim = next(size for size in (32, 16, 8) if settings.dim % size == 0)
        self.embedding = nn.Embedding(VOCABULARY, settings.dim)
        self.blocks = nn.ModuleList(Block(settings, self.head_dim) for _ in range(settings.layers))
        self.norm = nn.RMSNorm(settings.dim, eps=1e-5)
        self.head = nn.Linear(settings.dim, VOCABULARY, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        cos, sin = _angles(tokens.shape[1], self.head_dim, x.dtype)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.head(self.norm(x))


def build(settings: Settings) -> LanguageModel:
    """The same seed gives the same weights, and the caller's random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return LanguageModel(settings).to(getattr(torch, settings.dtype))


def _angles(length: int, head_dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), frequencies)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
