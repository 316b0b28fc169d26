"""Case generators: seeded inputs for tests and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tutelx import ops

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@dataclass(frozen=True, kw_only=True)
class Case:
    """T tokens, K choices, E experts, D model dim; skew is the share of slots that all want expert 0."""

    tokens: int
    top_k: int
    num_experts: int
    dim: int
    skew: float = 0.0
    unused: float = 0.0

    def __str__(self) -> str:
        extra = f"-skew{self.skew}" if self.skew else ""
        return f"T{self.tokens}-K{self.top_k}-E{self.num_experts}-D{self.dim}{extra}"


# Sizes that are multiples of nothing, and the corners.
ODD_CASES = [
    Case(tokens=0, top_k=2, num_experts=4, dim=8),
    Case(tokens=1, top_k=1, num_experts=1, dim=1),
    Case(tokens=7, top_k=3, num_experts=3, dim=5),
    Case(tokens=37, top_k=2, num_experts=11, dim=33, unused=0.2),
    Case(tokens=130, top_k=2, num_experts=5, dim=67, skew=0.7),
    Case(tokens=64, top_k=12, num_experts=16, dim=129, unused=0.1),
]


def expert_ids(case: Case, seed: int = 0) -> torch.Tensor:
    """[T, K] int32 on the CPU, distinct within a token before skew and unused slots are put in."""
    with torch.device("cpu"):
        return _expert_ids(case, torch.Generator().manual_seed(seed))


def _expert_ids(case: Case, generator: torch.Generator) -> torch.Tensor:
    noise = torch.rand((case.tokens, case.num_experts), generator=generator)
    ids = noise.argsort(dim=1)[:, : case.top_k].int()
    ids[torch.rand(ids.shape, generator=generator) < case.skew] = 0
    ids[torch.rand(ids.shape, generator=generator) < case.unused] = -1
    return ids


def skewed_ids(case: Case, fullest: int, seed: int = 0) -> torch.Tensor:
    """[T, K] int32 on the CPU, distinct within a token: expert 0 gets `fullest` slots, the others share the rest.

    fullest: at most T; a token chooses an expert once.
    """
    with torch.device("cpu"):
        generator = torch.Generator().manual_seed(seed)
        noise = torch.rand((case.tokens, case.num_experts), generator=generator)
        noise[:, 0] = 2.0
        noise[torch.randperm(case.tokens, generator=generator)[:fullest], 0] = -1.0
        return noise.argsort(dim=1)[:, : case.top_k].int()


def tensor(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, grad: bool = False) -> torch.Tensor:
    """Normal numbers, on torch's default device: other numbers on another kind of device."""
    device = torch.get_default_device()
    generator = torch.Generator(device).manual_seed(seed)
    # In double precision the largest benchmarks would not fit on an accelerator.
    drawn = torch.float64 if device.type == "cpu" else torch.promote_types(dtype, torch.float32)
    return torch.randn(shape, generator=generator, dtype=drawn).to(dtype).requires_grad_(grad)


def expert_weights(
    num_experts: int,
    model_dim: int,
    hidden_dim: int,
    *,
    gated: bool,
    bias: bool,
    listed: bool,
    dtype: torch.dtype,
    grad: bool = True,
) -> ops.ExpertWeights:
    """Weights of unit-variance scale, stacked in one tensor or as a list of matrices."""

    def make(seed: int, *shape: int):
        value = tensor(num_experts, *shape, dtype=dtype, seed=seed) / shape[-1] ** 0.5
        parts = value.unbind(0) if listed else (value,)
        return tuple(part.detach().clone().requires_grad_(grad) for part in parts)

    return ops.ExpertWeights(
        gate=make(1, hidden_dim, model_dim) if gated else (),
        up=make(2, hidden_dim, model_dim),
        down=make(3, model_dim, hidden_dim),
        gate_bias=make(4, hidden_dim) if gated and bias else (),
        up_bias=make(5, hidden_dim) if bias else (),
        down_bias=make(6, model_dim) if bias else (),
    )
