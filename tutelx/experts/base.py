"""What the layer asks of its experts."""

from __future__ import annotations

import torch
from torch import nn

from tutelx.types import DispatchMap, ExpertKernel, Layout, Plan


class Experts(nn.Module):
    """E experts. `layouts` and `kernels_for` say which plans they can run."""

    layouts: tuple[Layout, ...] = ("ragged", "padded")
    expert_kernels: tuple[ExpertKernel, ...] = ("tiled",)
    hidden_dim: int = 0

    def kernels_for(self, x: torch.Tensor) -> tuple[ExpertKernel, ...]:
        """Those that can run rows of x's dtype on its device; `expert_kernels` can run any."""
        return self.expert_kernels

    def forward(self, rows: torch.Tensor, map: DispatchMap, plan: Plan) -> torch.Tensor:
        """rows [R, M] -> [R, M]."""
        raise NotImplementedError
