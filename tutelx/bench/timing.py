"""How contenders are timed: in turns, on rotated inputs, for a given time."""

from __future__ import annotations

import itertools
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tutelx.bench.rotation import CACHE_MULTIPLE, size_of

# Runs calls back to back and returns the seconds that all of them took.
Clock = Callable[[Sequence[Callable[[], Any]]], float]

SHORTEST_SAMPLE = 200e-6  # seconds; shorter calls are timed several at a time
MOST_CALLS = 64  # of one sample
LEAST_SAMPLES = 3  # of the contenders that always run, whatever the time budget says
MOST_ROUNDS = 1000  # enough for quartiles; set-up takes several times as long as the shortest samples
# Keep the GPU busy while the calls are queued: about half a millisecond, and 50 microseconds more for each.
_SPIN_CYCLES, _SPIN_CYCLES_A_CALL = 1_000_000, 100_000


@dataclass(frozen=True)
class Stats:
    """Seconds of one call. The quartiles are those of the samples."""

    median: float
    q1: float
    q3: float
    n: int
    calls_per_sample: int

    @property
    def iqr(self) -> float:
        return self.q3 - self.q1

    @classmethod
    def of(cls, samples: Sequence[float], calls: int) -> Stats:
        several = samples if len(samples) > 1 else [samples[0], samples[0]]
        q1, middle, q3 = statistics.quantiles(several, n=4, method="inclusive")
        return cls(median=middle, q1=q1, q3=q3, n=len(samples), calls_per_sample=calls)


@dataclass
class Contender:
    """One of several ways to do the same.

    call: given one set of inputs; what it returns is dropped.
    inputs: the sets it takes in turn. Contenders that share a list never get the same set twice in a row, so that
        none finds in the cache what the one before has read.
    always: takes part in every round. The others sit out while they have had more than their share of the time.
    """

    name: str
    call: Callable[[Any], Any]
    inputs: Sequence[Any]
    always: bool = False
    samples: list[float] = field(default_factory=list)
    calls: int = 1

    def stats(self) -> Stats:
        return Stats.of(self.samples, self.calls)


def in_turns(contenders: Sequence[Contender], clock: Clock, seconds: float) -> None:
    """Fills the contenders' samples: one round is one sample of each, until the measured time reaches `seconds`.

    Interleaved, so that a slow moment of the machine falls on all of them. The first call of each warms up, and says
    how many calls make a sample.
    """
    turns = _Turns(contenders)
    for contender in contenders:
        first = clock([turns.next_call(contender)])
        again = clock([turns.next_call(contender)]) if first < seconds / 4 else first
        contender.calls = max(1, min(MOST_CALLS, int(SHORTEST_SAMPLE / max(again, 1e-9))))
    spent = dict.fromkeys((contender.name for contender in contenders), 0.0)
    share = 1.5 / len(contenders)
    for done in itertools.count():
        elapsed = sum(spent.values())
        if (elapsed >= seconds and done >= LEAST_SAMPLES) or done >= MOST_ROUNDS:
            return
        for contender in contenders:
            late = elapsed >= seconds or spent[contender.name] > share * elapsed
            if contender.samples and late and not contender.always:
                continue
            took = clock([turns.next_call(contender) for _ in range(contender.calls)])
            spent[contender.name] += took
            contender.samples.append(took / contender.calls)


class _Turns:
    """Hands out inputs; contenders that share a list share its turn."""

    def __init__(self, contenders: Sequence[Contender]) -> None:
        self._turns: dict[int, Iterator[Any]] = {}
        for contender in contenders:
            self._turns.setdefault(id(contender.inputs), itertools.cycle(contender.inputs))

    def next_call(self, contender: Contender) -> Callable[[], Any]:
        given = next(self._turns[id(contender.inputs)])
        return lambda: contender.call(given)


def cpu_clock(calls: Sequence[Callable[[], Any]]) -> float:
    begin = time.perf_counter()
    for call in calls:
        call()
    return time.perf_counter() - begin


class CudaClock:
    """Between two events on the device. It spins first, so that short kernels are queued before the clock starts; a
    call that waits for the device is timed with its waits.

    keep: bytes of outputs that stay alive, so that the next call writes elsewhere: torch would hand out the block just
        freed, and what was written to it would still lie in the device's cache.
    """

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._outputs: deque[tuple[int, Any]] = deque()
        self._bytes = 0

    def __call__(self, calls: Sequence[Callable[[], Any]]) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(_SPIN_CYCLES + _SPIN_CYCLES_A_CALL * len(calls))
        begin.record()
        for call in calls:
            self.hold(call())
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def hold(self, output: Any) -> None:
        size = size_of(output)
        self._outputs.append((size, output))
        self._bytes += size
        while self._bytes > self._keep:
            self._bytes -= self._outputs.popleft()[0]


def clock_for(device: torch.device, cache: int) -> Clock:
    """cache: bytes of the device's last-level cache."""
    return CudaClock(CACHE_MULTIPLE * cache) if device.type == "cuda" else cpu_clock
