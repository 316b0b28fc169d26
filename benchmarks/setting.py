"""A layer and the ranks that share it, as the scheduler's benchmarks time them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from tutelx.tuner.cases import Subject
from tutelx.tuner.grid import World
from tutelx.tuner.shapes import Shape


@dataclass(frozen=True, kw_only=True)
class Setting:
    shape: Shape
    world: World
    group: dist.ProcessGroup
    db: Path

    @property
    def subject(self) -> Subject:
        return Subject(
            shape=self.shape,
            group=self.group,
            ranks_per_node=self.world.ranks_per_node,
            device=torch.device(self.world.device),
            seed=0,
        )
