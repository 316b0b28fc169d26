"""What one call of a layer saw. Reading a figure may synchronise with the device; keeping it does not."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch

from tutelx.types import DispatchMap, Routing

if TYPE_CHECKING:
    from tutelx.comm.agreement import Agreed
    from tutelx.comm.call import RankCall


class Load:
    """How evenly slots fall on experts. counts: [E], slots of each expert."""

    def __init__(self, counts: torch.Tensor) -> None:
        self.counts = counts

    @cached_property
    def _shares(self) -> torch.Tensor:
        counts = self.counts.double()
        return counts / counts.sum().clamp_min(1.0)

    @cached_property
    def entropy(self) -> float:
        """-sum p ln p of the experts' shares p, in nats: ln E if even, 0 if one expert has all."""
        return float(torch.special.entr(self._shares).sum())

    @cached_property
    def cv(self) -> float:
        """Coefficient of variation: standard deviation (of the population) over mean; 0 without slots."""
        mean = self._shares.mean()
        return float(self._shares.std(correction=0) / mean) if mean > 0 else 0.0

    @cached_property
    def max_over_mean(self) -> float:
        """The fullest expert over the mean; 0 without slots."""
        return float(self._shares.max() * self._shares.numel())

    @cached_property
    def dead_experts(self) -> int:
        """Experts without a slot."""
        return int((self.counts == 0).sum())

    def __repr__(self) -> str:
        return (
            f"Load(entropy={self.entropy:.3f}, cv={self.cv:.3f}, max_over_mean={self.max_over_mean:.3f},"
            f" dead_experts={self.dead_experts})"
        )


class RoutingStats:
    """Load and drops of one call; nothing is computed before it is read."""

    def __init__(
        self,
        map: DispatchMap,
        routing: Routing | None = None,
        *,
        agreed: Agreed | None = None,
        call: RankCall | None = None,
    ) -> None:
        self._map, self._agreed, self._call = map, agreed, call
        self._requested = None if routing is None else routing.requested
        self._top_k = map.dest.shape[1] if routing is None else routing.top_k or map.dest.shape[1]
        self.capacity = map.capacity

    @property
    def tokens_per_expert(self) -> torch.Tensor:
        """[E] slots that asked for each expert, before any drop."""
        return self._map.counts if self._requested is None else self._requested

    @cached_property
    def received_per_expert(self) -> torch.Tensor:
        """[E] slots that got a row, after all drops."""
        counts = self._map.counts
        return counts if self.capacity is None else counts.clamp_max(self.capacity)

    @property
    def load_over_ranks(self) -> torch.Tensor:
        """[W, E] slots of every rank that asked for each expert, before the layer drops any."""
        return self.tokens_per_expert.unsqueeze(0) if self._agreed is None else self._agreed.counts

    @property
    def received_over_ranks(self) -> torch.Tensor:
        """[W, E] slots of every rank that got a row of each expert, after all drops."""
        if self._agreed is None:
            return self.received_per_expert.unsqueeze(0)
        return self._agreed.counts if self.capacity is None else self._agreed.counts.clamp_max(self.capacity)

    @property
    def bytes_tokens(self) -> int:
        """Bytes of rows that this rank sent to others; once the backward has run, those of their gradients too."""
        return 0 if self._call is None else self._call.bytes_tokens

    @property
    def bytes_weights(self) -> int:
        """Bytes of weights that this rank sent to others; once the backward has run, also what that gathered, and the
        gradients sent home."""
        return 0 if self._call is None else self._call.bytes_weights

    @cached_property
    def requested(self) -> Load:
        """The load before any drop: what the router wants."""
        return Load(self.tokens_per_expert)

    @cached_property
    def received(self) -> Load:
        """The load after all drops: what the experts compute."""
        return Load(self.received_per_expert)

    @cached_property
    def dropped(self) -> int:
        """Slots that asked for an expert and got no row."""
        return int(self.tokens_per_expert.sum()) - int(self.received_per_expert.sum())

    @cached_property
    def drop_rate(self) -> float:
        """`dropped` over the slots that asked; 0 if none did."""
        asked = int(self.tokens_per_expert.sum())
        return self.dropped / asked if asked else 0.0

    @cached_property
    def needed_capacity_factor(self) -> float:
        """The least capacity factor that drops nothing: max load * E / (K*T); 0 for an empty batch."""
        slots = self._map.dest.shape[0] * self._top_k
        counts = self.tokens_per_expert
        return int(counts.max()) * counts.numel() / slots if slots else 0.0

    def __repr__(self) -> str:
        return (
            f"RoutingStats(tokens_per_expert={self.tokens_per_expert.tolist()}, dropped={self.dropped},"
            f" needed_capacity_factor={self.needed_capacity_factor:.3f})"
        )
