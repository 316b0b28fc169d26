"""What a layer of a shape can run, before there is one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from tutelx.comm.placement import Placement
from tutelx.experts import FeedForwardExperts
from tutelx.ops.expert_products import groupable

if TYPE_CHECKING:
    from tutelx.tuner.grid import World
    from tutelx.tuner.shapes import Shape


def what_runs(shape: Shape, world: World) -> dict[str, Any]:
    """What a layer of this shape tells its planner that it can run."""
    dtype, device = getattr(torch, shape.dtype), torch.device(world.device)
    kernels: tuple[str, ...] = FeedForwardExperts.expert_kernels
    if world.world == 1:
        sizes = shape.num_experts, shape.model_dim, shape.hidden_dim
        return {"expert_kernels": (*kernels, "grouped") if groupable(*sizes, dtype, device) else kernels}
    placement = Placement(num_experts=shape.num_experts, hidden_dim=shape.hidden_dim, world=world.world)
    return {
        "expert_kernels": kernels,
        "shard_degrees": placement.degrees(),
        "all_to_alls": ("linear",) if world.ranks_per_node is None else ("linear", "2dh"),
    }
