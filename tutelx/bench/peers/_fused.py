"""A layer's inputs as most libraries hold them: gate and up in one tensor. T tokens, D model dim, H hidden dim."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from tutelx.bench.subject import Tensors
from tutelx.bench.subjects.layer import LayerInputs


@dataclass
class FusedInputs:
    """gate_up [E, 2H, D] and down [E, D, H], leaves like the rest."""

    x_TD: torch.Tensor
    grad_y_TD: torch.Tensor
    router: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    top_k: int

    def routing(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights [T, K] and ids [T, K], in plain torch."""
        scores = torch.softmax(F.linear(self.x_TD, self.router), dim=1, dtype=torch.float32)
        weights, ids = scores.topk(self.top_k, dim=1)
        return weights / weights.sum(dim=1, keepdim=True), ids

    def gradients(self, y_TD: torch.Tensor) -> Tensors:
        leaves = (self.x_TD, self.router, self.gate_up, self.down)
        return y_TD.detach(), *torch.autograd.grad(y_TD, leaves, self.grad_y_TD)


def fuse(inputs: LayerInputs) -> FusedInputs:
    x, router, gate, up, down = (leaf.detach() for leaf in inputs.leaves)
    return FusedInputs(
        x_TD=x.requires_grad_(),
        grad_y_TD=inputs.grad_y_TD,
        router=router.requires_grad_(),
        gate_up=torch.cat([gate, up], dim=1).requires_grad_(),
        down=down.requires_grad_(),
        top_k=inputs.top_k,
    )


def split(inputs: FusedInputs, output: Tensors) -> Tensors:
    """The gradients in the order of `LayerInputs.leaves`."""
    y, grad_x, grad_router, grad_gate_up, grad_down = output
    return y, grad_x, grad_router, *grad_gate_up.chunk(2, dim=1), grad_down
