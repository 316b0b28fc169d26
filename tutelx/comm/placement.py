"""Placement: which experts, and which part of their hidden dimension, each rank owns.

Symbols: E experts, H hidden dim, W ranks, s ranks an expert (slices), r shard degree (Tutel, section 4.1).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tutelx.errors import InvalidValueError


@dataclass(frozen=True, kw_only=True)
class Placement:
    """One layout of the weights for every plan.

    With fewer experts than ranks, E dividing W, each expert is cut into s = W/E slices along its hidden dimension:
    rank w owns slice w % s of expert w // s. Else s = 1 and the experts are dealt whole, as `torch.chunk` deals and
    DTensor's Shard(0) too: ceil(E/W) a rank, the last ranks fewer or none. Slices are dealt the same way.

    num_experts: E. hidden_dim: H, None for experts that cannot be sliced. world: W.
    """

    num_experts: int
    hidden_dim: int | None
    world: int

    def __post_init__(self) -> None:
        for name in ("num_experts", "world"):
            if getattr(self, name) < 1:
                raise InvalidValueError(f"{name}={getattr(self, name)} must be at least 1")

    @property
    def slices(self) -> int:
        """s: how many ranks share one expert."""
        sliced = self.hidden_dim is not None and self.num_experts < self.world
        return self.world // self.num_experts if sliced and self.world % self.num_experts == 0 else 1

    def experts_of(self, rank: int) -> range:
        """The experts of which the rank owns something."""
        self._check_rank(rank)
        if self.slices > 1:
            return range(rank // self.slices, rank // self.slices + 1)
        return chunk(self.num_experts, self.world, rank)

    def slice_of(self, rank: int) -> range:
        """The part of the hidden dimension that the rank owns of each of its experts; may be empty."""
        return self.part_of(rank, self.hidden_dim or 0)

    def part_of(self, rank: int, size: int) -> range:
        """The part that the rank owns of a dimension of another size that is sliced in the same way."""
        self._check_rank(rank)
        return chunk(size, self.slices, rank % self.slices)

    def ranks_of(self, expert: int) -> range:
        """The s ranks that own the expert, in the order of its slices."""
        if not 0 <= expert < self.num_experts:
            raise InvalidValueError(f"expert={expert} is outside [0, num_experts={self.num_experts})")
        if self.slices > 1:
            return range(expert * self.slices, (expert + 1) * self.slices)
        owner = expert // -(-self.num_experts // self.world)
        return range(owner, owner + 1)

    def degrees(self) -> tuple[int, ...]:
        """The shard degrees that can run: 0 gathers all weights, r >= 1 sends each token to r places; r divides s."""
        return 0, *(r for r in range(1, self.slices + 1) if self.slices % r == 0)

    def gathered_by(self, rank: int, degree: int) -> range:
        """The ranks, `rank` among them, that gather their slices of one expert at this degree: s/r of them."""
        self._check_rank(rank)
        size = self._group_size(degree)
        return range(rank // size * size, (rank // size + 1) * size)

    def targets(self, expert: int, source: int, degree: int) -> Iterator[int]:
        """The r ranks that rank `source` sends its rows for the expert to: one in each group, the same in all."""
        self._check_rank(source)
        size = self._group_size(degree)
        return (first + source % size for first in self.ranks_of(expert)[::size])

    def _group_size(self, degree: int) -> int:
        if degree == 0 or degree not in self.degrees():
            raise InvalidValueError(f"shard_degree={degree} is none of {self.degrees()[1:]} (s={self.slices})")
        return self.slices // degree

    def _check_rank(self, rank: int) -> None:
        if not 0 <= rank < self.world:
            raise InvalidValueError(f"rank={rank} is outside [0, world={self.world})")


def chunk(total: int, parts: int, index: int) -> range:
    """Part `index` of 0..total, cut into `parts` as `torch.chunk` cuts: ceil(total/parts) each, the last ones fewer."""
    size = -(-total // parts)
    return range(min(index * size, total), min((index + 1) * size, total))
