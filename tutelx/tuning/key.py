"""What a measurement is filed under: a workload, cut to what its time depends on, in buckets.

T tokens, K choices, E experts, M model dim, H hidden dim, W ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tutelx.types import Workload

_FINE = 3  # leading bits that stay: four buckets an octave


@dataclass(frozen=True, kw_only=True)
class Key:
    """One bucket of workloads.

    tokens: T of the rank that has most, the bucket's least.
    load_factor: rows of the fullest expert, after the capacity, over the mean K*T/E, the bucket's least; where the load
        is unknown, those that the capacity allows it; 0: that is unknown too.
    expert_numbers: parameters of one expert; tells gated from plain experts.
    threads: of torch on the CPU, the fewest of a rank.
    """

    tokens: int
    top_k: int
    load_factor: float
    num_experts: int
    model_dim: int
    hidden_dim: int
    expert_numbers: int
    dtype: str
    device: str
    training: bool
    threads: int
    world: int = 1
    ranks_per_node: int | None = None

    @classmethod
    def of(cls, workload: Workload) -> Key:
        return cls(
            tokens=bucket(workload.tokens),
            top_k=workload.top_k,
            load_factor=load_factor(workload),
            num_experts=workload.num_experts,
            model_dim=workload.model_dim,
            hidden_dim=workload.hidden_dim,
            expert_numbers=workload.expert_numbers,
            dtype=workload.dtype,
            device=workload.device,
            training=workload.training,
            threads=workload.threads,
            world=workload.world,
            ranks_per_node=workload.ranks_per_node,
        )

    def workload(self, **what_runs: Any) -> Workload:
        """The smallest workload of the bucket; what can run is that of one process unless it is given."""
        slots, demand = self.tokens * self.top_k, None
        if self.load_factor:
            demand = min(self.tokens, math.ceil(self.load_factor * slots / self.num_experts - 1e-9))
        return Workload(
            tokens=self.tokens,
            top_k=self.top_k,
            num_experts=self.num_experts,
            model_dim=self.model_dim,
            hidden_dim=self.hidden_dim,
            demand=demand,
            capacity=None,
            dtype=self.dtype,
            device=self.device,
            training=self.training,
            threads=self.threads,
            world=self.world,
            ranks_per_node=self.ranks_per_node,
            expert_numbers=self.expert_numbers,
            **what_runs,
        )

    @property
    def kind(self) -> tuple[object, ...]:
        """What must be equal for two keys to be compared at all."""
        matrices = round(self.expert_numbers / max(1, self.model_dim * self.hidden_dim))
        return (self.dtype, self.device, self.training, self.threads, self.world, self.ranks_per_node, matrices)

    def distance(self, other: Key) -> float:
        """Octaves between two keys of one kind: |log2| of the ratio of each size, summed; infinite between kinds."""
        if self.kind != other.kind:
            return math.inf
        sizes = (
            (self.tokens, other.tokens),
            (self.top_k, other.top_k),
            (self.load_factor, other.load_factor),
            (self.num_experts, other.num_experts),
            (self.model_dim, other.model_dim),
            (self.hidden_dim, other.hidden_dim),
        )
        return sum(abs(math.log2(max(a, 0.5) / max(b, 0.5))) for a, b in sizes)


def bucket(n: int) -> int:
    """The least number of n's bucket: four an octave, each number below 8 its own."""
    shift = n.bit_length() - _FINE
    return n if shift <= 0 else n >> shift << shift


def load_factor(workload: Workload) -> float:
    """The fullest expert's rows over the mean, in buckets of a quarter octave; 0 if load and capacity are unknown."""
    slots, demand, capacity = workload.tokens * workload.top_k, workload.demand, workload.capacity
    if demand is None:
        demand = capacity
    if demand is None or not slots:
        return 0.0
    fullest = demand if capacity is None or demand < capacity else capacity
    factor = max(fullest * workload.num_experts / slots, 1e-3)
    return float(2.0 ** (math.floor(4 * math.log2(factor) + 1e-9) / 4))
