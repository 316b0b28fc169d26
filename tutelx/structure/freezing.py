"""Fine-tuning: which parameters learn (ST-MoE, section 4.2)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from tutelx.base import MoEBase
from tutelx.structure.shared import ResidualMoE, SharedExperts


def moe_layers(model: nn.Module) -> Iterator[tuple[str, MoEBase]]:
    """The MoE layers of a model, made with `MoE` or wrapped, with their names."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, MoEBase))


def aux_loss(model: nn.Module) -> torch.Tensor:
    """The sum of the last call's auxiliary losses of all MoE layers; 0 without any."""
    losses = [layer.aux_loss for _, layer in moe_layers(model)]
    device = next((loss.device for loss in losses if loss.requires_grad), torch.device("cpu"))
    return torch.stack([loss.to(device) for loss in losses]).sum() if losses else torch.zeros(())


def freeze_moe(model: nn.Module) -> list[str]:
    """Only the MoE layers stop learning: router, experts, and shared or residual networks beside them.

    Returns the names of the parameters that were frozen. All other parameters stay as they are.
    """
    inside = _inside(model)
    for parameter in inside.values():
        parameter.requires_grad_(False)
    return sorted(inside)


def train_only_moe(model: nn.Module) -> list[str]:
    """Only the MoE layers learn; everything else is frozen. Returns the names of the parameters that learn."""
    inside = _inside(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in inside)
    return sorted(inside)


def _inside(model: nn.Module) -> dict[str, nn.Parameter]:
    prefixes = tuple(
        f"{name}." if name else ""
        for name, module in model.named_modules()
        if isinstance(module, (MoEBase, SharedExperts, ResidualMoE))
    )
    return {name: p for name, p in model.named_parameters() if prefixes and name.startswith(prefixes)}
