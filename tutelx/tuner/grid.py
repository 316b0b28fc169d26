"""The workloads that are measured: every layer with every number of tokens, choices and load that was asked for.

T tokens of a rank, K choices, E experts, W ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from tutelx.errors import InvalidTypeError, InvalidValueError
from tutelx.tuner.shapes import Shape
from tutelx.tuning.key import Key
from tutelx.types import Workload

UNKNOWN_LOAD = 2.0  # the load factor that stands for loads which a device does not tell
_MOST_TOKENS = 2**24


@dataclass(frozen=True, kw_only=True)
class World:
    """Where layers run. threads: of torch on the CPU. world: ranks that share the experts."""

    device: str = "cpu"
    threads: int = 1
    world: int = 1
    ranks_per_node: int | None = None


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Ranges, each a list of values. load_factors: rows of the fullest expert over the mean.

    Raises:
        InvalidValueError, InvalidTypeError: a list is empty, or holds what no workload has.
    """

    tokens: tuple[int, ...]
    top_k: tuple[int, ...] = (1, 2)
    load_factors: tuple[float, ...] = (1.0, 2.0, 4.0)
    training: bool = True

    def __post_init__(self) -> None:
        for name, most in (("tokens", _MOST_TOKENS), ("top_k", 2**16), ("load_factors", 2**16)):
            values = getattr(self, name)
            if not values:
                raise InvalidValueError(f"{name} is empty")
            for value in values:
                kinds = (int, float) if name == "load_factors" else (int,)
                if isinstance(value, bool) or not isinstance(value, kinds):
                    raise InvalidTypeError(f"{name}={value!r} is {type(value).__name__}, expected a number")
                if not 1 <= value <= most:
                    raise InvalidValueError(f"{name}={value} is outside 1..{most}")

    def workloads(self, shapes: Iterable[Shape], world: World) -> list[Workload]:
        """One for each key, those with fewer tokens first; loads that a shape cannot have become the nearest it can.

        Raises:
            InvalidValueError: `top_k` exceeds the experts of a shape.
        """
        found: dict[Key, Workload] = {}
        for shape in shapes:
            for tokens in sorted(set(self.tokens)):
                for top_k in sorted(set(self.top_k)):
                    if top_k > shape.num_experts:
                        raise InvalidValueError(f"top_k={top_k} exceeds num_experts={shape.num_experts} of {shape}")
                    for factor in sorted(set(self.load_factors)):
                        work = workload(shape, world, tokens, top_k, factor, training=self.training)
                        found.setdefault(Key.of(work), work)
        return list(found.values())


def workload(shape: Shape, world: World, tokens: int, top_k: int, factor: float, *, training: bool) -> Workload:
    """What the layer's planner is told when the fullest expert of each rank gets `factor` times the mean K*T/E, rounded
    up, at most T."""
    from tutelx.tuner.runnable import what_runs  # torch is for those who need it

    demand = min(tokens, math.ceil(factor * tokens * top_k / shape.num_experts - 1e-9))
    told = world.device == "cpu" or world.world > 1
    return Workload(
        tokens=tokens,
        top_k=top_k,
        num_experts=shape.num_experts,
        model_dim=shape.model_dim,
        hidden_dim=shape.hidden_dim,
        demand=demand if told else None,
        capacity=None,
        dtype=shape.dtype,
        device=world.device,
        training=training,
        threads=world.threads,
        world=world.world,
        ranks_per_node=world.ranks_per_node,
        expert_numbers=shape.expert_numbers,
        **what_runs(shape, world),
    )


def workload_of(key: Key) -> Workload:
    """The smallest workload of a key's bucket.

    Raises:
        InvalidValueError: no built-in layer has such a workload.
    """
    shape = Shape.of(key)
    world = World(device=key.device, threads=key.threads, world=key.world, ranks_per_node=key.ranks_per_node)
    found = workload(shape, world, key.tokens, key.top_k, key.load_factor or UNKNOWN_LOAD, training=key.training)
    if key.top_k > key.num_experts or key.tokens < 1:
        raise InvalidValueError(f"top_k={key.top_k}, tokens={key.tokens}, num_experts={key.num_experts} is no workload")
    return found


def fullest(workload: Workload) -> int:
    """Rows that the fullest expert gets from each rank, at least the mean and at most T."""
    mean = math.ceil(workload.tokens * workload.top_k / workload.num_experts)
    known = [rows for rows in (workload.demand, workload.capacity) if rows is not None]
    rows = min(known) if known else math.ceil(UNKNOWN_LOAD * workload.tokens * workload.top_k / workload.num_experts)
    return min(workload.tokens, max(mean, rows))


def ranges(text: str, name: str) -> tuple[int, ...]:
    """ "64..512" by octaves, "64,96,512" as it is, or both: "1,64..512".

    Raises:
        InvalidValueError: it is neither; names the flag.
    """
    found: list[int] = []
    for part in text.split(","):
        first, dots, last = part.strip().partition("..")
        ends = [first, last] if dots else [first]
        if not all(end.isdecimal() and 1 <= len(end) <= 9 for end in ends):
            raise InvalidValueError(f"--{name} {part.strip()!r} is neither a whole number nor a range such as 64..8192")
        low, high = int(ends[0]), int(ends[-1])
        if low > high or low < 1:
            raise InvalidValueError(f"--{name} {part.strip()!r} must go up from at least 1")
        while low < high:
            found.append(low)
            low *= 2
        found.append(high)
    return tuple(dict.fromkeys(found))


def numbers(text: str, name: str) -> tuple[float, ...]:
    """ "1,2,4" or "1.25".

    Raises:
        InvalidValueError: it is something else; names the flag.
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InvalidValueError(f"--{name} {text!r} is no list of numbers such as 1,2,4") from None
