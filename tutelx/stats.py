"""What one call of a layer saw. Reading a figure may synchronise with the device; keeping it does not."""

from __future__ import annotations

from functools import cached_property

import torch

from tutelx.types import DispatchMap


class RoutingStats:
    """Load and drops of one call; nothing is computed before it is read."""

    def __init__(self, map: DispatchMap) -> None:
        self._counts, self._dest = map.counts, map.dest
        self.capacity = map.capacity

    @property
    def tokens_per_expert(self) -> torch.Tensor:
        """[E] int32: slots that asked for each expert, before any drop."""
        return self._counts

    @cached_property
    def dropped(self) -> int:
        """Slots that asked for an expert and got no row."""
        kept = int((self._dest >= 0).sum())
        return int(self._counts.sum()) - kept

    @cached_property
    def needed_capacity_factor(self) -> float:
        """The least capacity factor that drops nothing: max load * E / (K*T); 0 for an empty batch."""
        slots = self._dest.numel()
        return int(self._counts.max()) * self._counts.numel() / slots if slots else 0.0

    def __repr__(self) -> str:
        return (
            f"RoutingStats(tokens_per_expert={self._counts.tolist()}, dropped={self.dropped},"
            f" needed_capacity_factor={self.needed_capacity_factor:.3f})"
        )
