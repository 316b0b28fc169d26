"""What a scheduler has answered before, found again in a few microseconds."""

from __future__ import annotations

from itertools import islice
from threading import Lock
from typing import Generic, TypeVar

from tutelx.planner import MOST_PADDING, least_sent, tiles
from tutelx.tuning.key import bucket, load_factor
from tutelx.types import Workload

Bucket = tuple[object, ...]
Value = TypeVar("Value")


def bucket_of(workload: Workload) -> Bucket:
    """Equal for two workloads only if their keys are equal, the same plans can run, and the rules choose alike.

    It stands for a `Key` and is much quicker to make.
    """
    w, capacity = workload, workload.capacity
    if w.device == "cpu":
        ruled: object = tiles(w)
    else:
        # The rules look at nothing else there.
        ruled = capacity is not None and capacity * w.num_experts <= MOST_PADDING * w.tokens * w.top_k
    return (
        bucket(w.tokens),
        w.top_k,
        load_factor(w),
        ruled,
        1 if w.world == 1 else _ruled_degree(w),
        w.demand is None,
        w.num_experts,
        w.model_dim,
        w.hidden_dim,
        w.expert_numbers,
        w.dtype,
        w.device,
        w.training,
        w.threads,
        w.world,
        w.ranks_per_node,
        w.layouts,
        w.expert_kernels,
        w.shard_degrees,
        w.all_to_alls,
    )


class Memo(Generic[Value]):
    """At most `limit` values by bucket; when it is full, the oldest quarter goes. Safe to read from many threads."""

    def __init__(self, limit: int = 4096) -> None:
        self.limit = limit
        self._values: dict[Bucket, Value] = {}
        self._lock = Lock()
        self.get = self._values.get

    def __len__(self) -> int:
        return len(self._values)

    def keep(self, key: Bucket, value: Value) -> None:
        with self._lock:
            if len(self._values) >= self.limit and key not in self._values:
                for old in list(islice(self._values, max(1, self.limit // 4))):
                    del self._values[old]
            self._values[key] = value

    def clear(self) -> None:
        with self._lock:
            self._values.clear()


_degrees: Memo[int] = Memo()


def _ruled_degree(w: Workload) -> int:
    """The shard degree that the rules choose."""
    sizes = (w.tokens, w.top_k, w.model_dim, w.num_experts, w.expert_numbers, w.world, w.shard_degrees, w.training)
    degree = _degrees.get(sizes)
    if degree is None:
        degree = least_sent(w)
        _degrees.keep(sizes, degree)
    return degree
