"""Policies: how many experts a token has and how many rows an expert, decided anew for every call.

Unlike a plan they change the numbers, so nobody gets one unasked: `MoE(top_k=policy, capacity=policy)`. What a policy
answers follows from the step and from loads that all ranks agreed on, so all ranks have the same answer.
Shapes: T tokens of the rank that has most, K choices a token, E experts, W ranks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import nn

from tutelx.errors import InvalidTypeError, InvalidValueError
from tutelx.types import Capacity

FACTORS = tuple(2.0 ** (i / 4) for i in range(-8, 49))  # four buckets an octave, 0.25 to 4096


@dataclass(frozen=True, kw_only=True, eq=False)
class Seen:
    """One call of the past. counts: [W, E] on the CPU, slots of each rank that asked for an expert, before any drop."""

    counts: torch.Tensor
    tokens: int
    top_k: int

    def drop_rates(self, factors: Sequence[float]) -> list[float]:
        """The share of slots that `Capacity.fixed(factor)` would have dropped, for each factor."""
        sizes = {"tokens": self.tokens, "top_k": self.top_k, "num_experts": self.counts.shape[1]}
        limits = [Capacity.fixed(factor).limit(**sizes) for factor in factors]
        over = self.counts.reshape(1, -1) - torch.tensor(limits).unsqueeze(1)
        asked = max(1, int(self.counts.sum()))
        return [dropped / asked for dropped in over.clamp_min(0).sum(dim=1).tolist()]

    @cached_property
    def rates(self) -> list[float]:
        """Those of FACTORS."""
        return self.drop_rates(FACTORS)


@dataclass(frozen=True, kw_only=True)
class Call:
    """What is known when a call begins.

    step: training calls of this layer before this one; recomputation under activation checkpointing does not count.
    recent: the latest calls, the last one first.
    seconds: what such a call as the last would take with another K, forward and in training backward, as measured or
        predicted; None if nobody knows.
    """

    step: int
    training: bool
    num_experts: int
    recent: Sequence[Seen] = ()
    seconds: Callable[[int], float | None] = field(default=lambda top_k: None, compare=False)


class CapacityPolicy(Protocol):
    """window: the calls of the past that it looks at."""

    window: int

    def capacity(self, call: Call) -> Capacity: ...


class TopKPolicy(Protocol):
    """None stands for the gate's own K."""

    def top_k(self, call: Call) -> int | None: ...


@dataclass(frozen=True, kw_only=True)
class TargetDropRate:
    """The least capacity factor, of four an octave, whose drops stay at or below a rate.

    The drops of a factor are those that it would have caused in the last `window` calls, on average over them; before
    the first call nothing is dropped. Evaluation goes by its own calls, so it changes nothing in training. On an
    accelerator without ranks a call waits until the one before has routed.

    Raises:
        InvalidValueError: a rate outside [0, 1), a window that is no positive integer.
    """

    rate: float
    window: int = 8

    def __post_init__(self) -> None:
        if isinstance(self.rate, bool) or not isinstance(self.rate, (int, float)) or not 0 <= self.rate < 1:
            raise InvalidValueError(f"rate={self.rate!r} is outside [0, 1)")
        if isinstance(self.window, bool) or not isinstance(self.window, int) or self.window < 1:
            raise InvalidValueError(f"window={self.window!r} must be an int of at least 1")

    def capacity(self, call: Call) -> Capacity:
        recent = list(call.recent)[: self.window]
        if not recent:
            return Capacity.dropless()
        low, high = 0, len(FACTORS)
        while low < high:  # drops never grow with the factor
            middle = (low + high) // 2
            dropped = sum(seen.rates[middle] for seen in recent) / len(recent)
            low, high = (low, middle) if dropped <= self.rate else (middle + 1, high)
        return Capacity.dropless() if low == len(FACTORS) else Capacity.fixed(FACTORS[low])


class ScheduledTopK:
    """K by step: `ScheduledTopK({0: 1, 1000: 2})` has one expert a token for 1000 training calls, then two.

    Raises:
        InvalidValueError: no entry for step 0, a negative step, a K below 1.
    """

    def __init__(self, by_step: dict[int, int]) -> None:
        for step, k in by_step.items():
            for name, value, least in (("step", step, 0), ("K", k, 1)):
                if isinstance(value, bool) or not isinstance(value, int) or value < least:
                    raise InvalidValueError(f"{name}={value!r} of the schedule must be an int of at least {least}")
        if 0 not in by_step:
            raise InvalidValueError(f"the schedule {by_step} has no K for step 0")
        self.by_step = dict(sorted(by_step.items()))

    def top_k(self, call: Call) -> int:
        return next(k for step, k in reversed(self.by_step.items()) if step <= call.step)

    def __repr__(self) -> str:
        return f"ScheduledTopK({self.by_step})"


@dataclass(frozen=True, kw_only=True)
class LatencyBudget:
    """The largest K, from `most` down to 1, with which a call like the last is expected to take at most `seconds`.

    The time is that of the planner's record or model; the gate's own K holds for the first call, and where the planner
    knows no time. Should no K fit, it is 1.

    most: None: the number of experts.

    Raises:
        InvalidValueError: seconds that are not above 0, `most` below 1.
    """

    seconds: float
    most: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.seconds, bool) or not isinstance(self.seconds, (int, float)) or not self.seconds > 0:
            raise InvalidValueError(f"seconds={self.seconds!r} must be above 0")
        if self.most is not None and (isinstance(self.most, bool) or not isinstance(self.most, int) or self.most < 1):
            raise InvalidValueError(f"most={self.most!r} must be an int of at least 1")

    def top_k(self, call: Call) -> int | None:
        if not call.recent:
            return None
        most = call.num_experts if self.most is None else min(self.most, call.num_experts)
        times = {k: call.seconds(k) for k in range(most, 0, -1)}
        if all(seconds is None for seconds in times.values()):
            return None
        return next((k for k, seconds in times.items() if seconds is not None and seconds <= self.seconds), 1)


class Policies(nn.Module):
    """The policies of one layer and what they go by. Its step is part of the state dict, if K has a policy.

    Raises:
        InvalidTypeError: a policy that is none.
    """

    def __init__(self, top_k: Any = None, capacity: Any = None) -> None:
        super().__init__()
        if top_k is not None and not hasattr(top_k, "top_k") and not callable(top_k):
            raise InvalidTypeError(f"top_k is {type(top_k).__name__}, expected int, a policy or a callable")
        if capacity is not None and not hasattr(capacity, "capacity"):
            raise InvalidTypeError(f"capacity is {type(capacity).__name__}, expected tutelx.Capacity or a policy")
        self.top_k, self.capacity = top_k, capacity
        self.count = 0
        window = max(1, getattr(capacity, "window", 1))
        self._recent: dict[bool, deque[Seen | _Late]] = {mode: deque(maxlen=window) for mode in (True, False)}
        if top_k is not None:
            self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def choose(
        self, num_experts: int, seconds: Callable[[int, Capacity | None], float | None]
    ) -> tuple[int | None, Capacity | None]:
        """K and capacity of a call that begins, None where there is no policy.

        Raises:
            InvalidValueError, InvalidTypeError: a policy gave a K or a capacity that is none.
        """
        recent = [s.read() if isinstance(s, _Late) else s for s in self._recent[self.training]]
        call = Call(step=self.count, training=self.training, num_experts=num_experts, recent=recent)
        capacity = None if self.capacity is None else self.capacity.capacity(call)
        if capacity is not None and not isinstance(capacity, Capacity):
            raise InvalidTypeError(f"{self.capacity} gave {type(capacity).__name__}, expected tutelx.Capacity")
        if self.top_k is None:
            return None, capacity
        call = Call(
            step=self.count,
            training=self.training,
            num_experts=num_experts,
            recent=recent,
            seconds=lambda k: seconds(k, capacity),
        )
        top_k = self.top_k.top_k(call) if hasattr(self.top_k, "top_k") else self.top_k(call)
        if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
            raise InvalidValueError(f"{self.top_k} gave top_k={top_k!r}, expected an int of at least 1")
        return top_k, capacity

    def saw(self, counts: torch.Tensor, tokens: int, top_k: int) -> None:
        """After a call, which is no recomputation. counts: [W, E]."""
        self.count += self.training
        late = _Late(counts, tokens, top_k)
        self._recent[self.training].appendleft(late if counts.is_cuda else late.read())

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if "step" in self._buffers:
            self._buffers["step"].fill_(self.count)  # type: ignore[union-attr]
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        if "step" in self._buffers:
            self.count = int(self._buffers["step"])  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        return f"top_k={self.top_k}, capacity={self.capacity}"


def split(top_k: Any, capacity: Any) -> tuple[int | None, Capacity, Policies | None]:
    """What is fixed and what has a policy.

    Raises:
        InvalidTypeError, InvalidValueError: neither of both.
    """
    fixed_k = top_k is None or isinstance(top_k, int)
    fixed_rows = capacity is None or isinstance(capacity, Capacity)
    if fixed_k and top_k is not None and (isinstance(top_k, bool) or top_k < 1):
        raise InvalidValueError(f"top_k={top_k!r} must be an int of at least 1")
    policies = (
        None if fixed_k and fixed_rows else Policies(None if fixed_k else top_k, None if fixed_rows else capacity)
    )
    return (
        top_k if fixed_k else None,
        capacity if fixed_rows and capacity is not None else Capacity.dropless(),
        policies,
    )


class _Late:
    """Counts that a device is still working on, on their way to the host."""

    def __init__(self, counts: torch.Tensor, tokens: int, top_k: int) -> None:
        self._tokens, self._top_k = tokens, top_k
        self._counts, self._there = counts, None
        self._seen: Seen | None = None
        if counts.is_cuda:
            self._counts = torch.empty(counts.shape, dtype=counts.dtype, pin_memory=True)
            self._counts.copy_(counts, non_blocking=True)
            self._there = torch.cuda.Event()
            self._there.record(torch.cuda.current_stream(counts.device))

    def read(self) -> Seen:
        if self._seen is None:
            if self._there is not None:
                self._there.synchronize()
            self._seen = Seen(counts=self._counts, tokens=self._tokens, top_k=self._top_k)
        return self._seen

    def __deepcopy__(self, memo: dict) -> Seen:
        return self.read()

    def __reduce__(self) -> tuple:
        seen = self.read()
        return _seen, (seen.counts, seen.tokens, seen.top_k)


def _seen(counts: torch.Tensor, tokens: int, top_k: int) -> Seen:
    return Seen(counts=counts, tokens=tokens, top_k=top_k)
