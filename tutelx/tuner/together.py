"""What ranks decide together while they measure: all see the same numbers, so all do the same."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
import torch.distributed as dist


class Together:
    """This process and the other ranks of `group`; None: this process alone, and nothing is sent."""

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device) -> None:
        self.group, self.device = group, device
        self.rank = 0 if group is None else dist.get_rank(group)
        self.world = 1 if group is None else dist.get_world_size(group)

    def most(self, values: Sequence[float]) -> list[float]:
        """The greatest of all ranks, value by value. All must call with equally many. NaN counts as infinite."""
        if self.group is None:
            return list(values)
        found = torch.tensor(list(values), dtype=torch.float64).nan_to_num(nan=float("inf")).to(self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX, self.group)
        return found.tolist()

    def first(self, values: Sequence[float]) -> list[float]:
        """Those of rank 0. All must call with equally many."""
        if self.group is None:
            return list(values)
        found = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        dist.broadcast(found, dist.get_global_rank(self.group, 0), self.group)
        return found.tolist()

    def begin(self) -> None:
        """All ranks leave this at about the same time, with nothing outstanding on their devices."""
        self.finish()
        if self.group is not None:
            dist.barrier(self.group)

    def finish(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Clock:
    """Seconds since it was made, those of rank 0 everywhere."""

    def __init__(self, together: Together) -> None:
        self._together, self._begin = together, time.perf_counter()

    def elapsed(self) -> float:
        return self._together.first([time.perf_counter() - self._begin])[0]
