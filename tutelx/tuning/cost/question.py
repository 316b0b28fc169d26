"""A layer on so many ranks, every plan that could run it, and where the best changes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from tutelx.errors import InvalidTypeError, InvalidValueError
from tutelx.tuning.cost.base import Cost, CostModel
from tutelx.types import AllToAll, Capacity, ExpertKernel, Layout, Plan, Workload

MOST_RANKS = 1_000_000
DEGREES = (1, 2, 4, 8)
DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True, kw_only=True)
class Question:
    """tokens: of a rank. capacity: f, rows of the fullest expert over the mean, which a padded layout gives to all.

    gated: experts of three matrices instead of two.

    Raises:
        InvalidValueError, InvalidTypeError: a size below 1 or a number that is none.
    """

    gpus: int
    node_size: int
    experts: int
    model_dim: int
    hidden_dim: int
    tokens: int
    top_k: int = 2
    capacity: float = 1.0
    dtype: str = "bfloat16"
    device: str = "cuda"
    training: bool = True
    gated: bool = False

    def __post_init__(self) -> None:
        for name in ("gpus", "node_size", "experts", "model_dim", "hidden_dim", "tokens", "top_k"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise InvalidTypeError(f"{name}={value!r} is no int")
            if not 1 <= value <= 2**40:
                raise InvalidValueError(f"{name}={value} must be at least 1 and at most 2**40")
        if self.gpus > MOST_RANKS:
            raise InvalidValueError(f"gpus={self.gpus} must be at most {MOST_RANKS}")
        if self.top_k > self.experts:
            raise InvalidValueError(f"top_k={self.top_k} exceeds experts={self.experts}")
        if not (0 < self.capacity <= 1e6):
            raise InvalidValueError(f"capacity={self.capacity} must be positive and at most 1e6")
        if self.dtype not in DTYPES:
            raise InvalidValueError(f"dtype={self.dtype!r} is none of {', '.join(DTYPES)}")

    @property
    def workload(self) -> Workload:
        W, E = self.gpus, self.experts
        s = W // E if W > E and W % E == 0 else 1
        rows = Capacity.fixed(self.capacity).limit(tokens=self.tokens, top_k=self.top_k, num_experts=E)
        two_steps = 1 < self.node_size < W and W % self.node_size == 0
        all_to_alls: tuple[AllToAll, ...] = ("linear", "2dh") if two_steps else ("linear",)
        return Workload(
            tokens=self.tokens,
            top_k=self.top_k,
            num_experts=E,
            model_dim=self.model_dim,
            hidden_dim=self.hidden_dim,
            demand=rows,
            capacity=rows,
            dtype=self.dtype,
            device=self.device,
            training=self.training,
            threads=1,
            expert_kernels=("tiled", "bmm"),
            shard_degrees=(0, *_divisors(s)) if W > 1 else (1,),
            all_to_alls=all_to_alls,
            world=W,
            ranks_per_node=self.node_size,
            expert_numbers=(3 if self.gated else 2) * self.model_dim * self.hidden_dim,
        )


@dataclass(frozen=True, kw_only=True)
class Predicted:
    plan: Plan
    cost: Cost


def plans_of(workload: Workload) -> Iterator[Plan]:
    """Every shard degree, pipeline degree and all-to-all, padded for one batched product and ragged."""
    kinds: tuple[tuple[Layout, ExpertKernel], ...] = (("padded", "bmm"), ("ragged", "tiled"))
    for (layout, kernel), shard in itertools.product(kinds, workload.shard_degrees):
        sends = workload.world > 1 and shard > 0
        for d, way in itertools.product(DEGREES if sends else (1,), workload.all_to_alls if sends else ("linear",)):
            yield Plan(
                layout=layout,
                expert_kernel=kernel,
                shard_degree=shard,
                pipeline_degree=d,
                all_to_all=way,  # type: ignore[arg-type]
            )


def ranked(question: Question, model: CostModel) -> list[Predicted]:
    """All plans, the quickest first; of equal ones the first of :func:`plans_of`."""
    workload = question.workload
    found = [Predicted(plan=plan, cost=model.predict(workload, plan)) for plan in plans_of(workload)]
    return sorted(found, key=lambda each: each.cost.total)


def best(question: Question, model: CostModel) -> Predicted:
    return ranked(question, model)[0]


@dataclass(frozen=True, kw_only=True)
class Range:
    """From `first` to `last` of what was varied, `plan` is the best."""

    first: float
    last: float
    plan: Plan


def over_capacity(question: Question, model: CostModel) -> list[Range]:
    """The best plan for f from 1 (or the question's, if less) to 16, four values an octave."""
    least = min(1.0, question.capacity)
    factors = [least * 2 ** (i / 4) for i in range(round(4 * math.log2(16 / least)) + 1)]
    return _ranges([(round(f, 3), best(replace(question, capacity=f), model).plan) for f in factors])


def over_scale(question: Question, model: CostModel) -> list[Range]:
    """The best plan for 1, 2, 4, ... ranks up to the question's, with as many experts a rank as it has."""
    worlds = [question.gpus]
    while worlds[-1] % 2 == 0:
        worlds.append(worlds[-1] // 2)
    found: list[tuple[float, Plan]] = []
    for world in reversed(worlds):
        experts = max(question.top_k, round(question.experts * world / question.gpus))
        found.append((world, best(replace(question, gpus=world, experts=experts), model).plan))
    return _ranges(found)


def _ranges(found: Sequence[tuple[float, Plan]]) -> list[Range]:
    out: list[Range] = []
    for value, plan in found:
        if out and out[-1].plan == plan:
            out[-1] = replace(out[-1], last=value)
        else:
            out.append(Range(first=value, last=value, plan=plan))
    return out


def _divisors(n: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})
