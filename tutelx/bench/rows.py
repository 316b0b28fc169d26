"""One row of the benchmark: make the inputs, check that all ways agree, time them in turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tutelx.bench import machine, rotation
from tutelx.bench.peers import one_line
from tutelx.bench.shapes import Shape
from tutelx.bench.subject import Subject, Way
from tutelx.bench.timing import Clock, Contender, Stats, in_turns
from tutelx.errors import InvalidValueError, ParityError
from tutelx.integrations.parity import GRADIENT_TOLERANCE, TOLERANCE, relative_error

REFERENCE_SLOTS = 512  # the reference is a Python loop over slots
MOST_MEMORY = 0.5  # of the memory available: a row that needs more is left out


@dataclass
class Measured:
    """Samples of one contender. kind: "ours", "yardstick", "plain", "reference" or "peer"."""

    name: str
    kind: str
    stats: Stats
    samples: list[float]


@dataclass
class Row:
    """status: "ok", "failed" (with the error) or "left out" (with the reason).

    skipped: why other contenders are missing.
    """

    op: str
    shape: Shape
    dtype: str
    status: str = "ok"
    error: str | None = None
    must_move: int = 0
    flops: int | None = None
    relative_error: float | None = None
    working_set: rotation.WorkingSet | None = None
    measured: list[Measured] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def one(self, kind: str) -> Measured:
        (found,) = (each for each in self.measured if each.kind == kind)
        return found

    def percent_of_yardstick(self) -> tuple[float, float, float]:
        """Lower quartile, median and upper quartile of yardstick over ours, round by round: a slow moment of the
        machine falls on both."""
        pairs = zip(self.one("yardstick").samples, self.one("ours").samples)
        ratios = [100 * yardstick / ours for yardstick, ours in pairs]
        stats = Stats.of(ratios, 1)
        return stats.q1, stats.median, stats.q3

    def speed_up(self, name: str) -> float:
        (other,) = (each for each in self.measured if each.name == name)
        return other.stats.median / self.one("ours").stats.median


def measure(
    subject: Subject,
    shape: Shape,
    dtype_name: str,
    *,
    device: torch.device,
    peers: Mapping[str, Way],
    seconds: float,
    clock: Clock,
) -> Row:
    """Never raises for what is wrong with one op at one shape; that is the row's status."""
    row = Row(op=subject.op, shape=shape, dtype=dtype_name)
    try:
        _measure(row, subject, device, peers, seconds, clock)
    except InvalidValueError as error:
        row.status, row.error = "left out", str(error)
    except Exception as error:
        row.status, row.error = "failed", str(error) if isinstance(error, ParityError) else one_line(error)
    return row


def _measure(
    row: Row, subject: Subject, device: torch.device, peers: Mapping[str, Way], seconds: float, clock: Clock
) -> None:
    dtype = getattr(torch, row.dtype)
    row.must_move = subject.must_move(row.shape, dtype.itemsize)
    row.flops = None if subject.flops is None else subject.flops(row.shape)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # blocks of the last row's sizes would only stand in the way
    memory = machine.available_memory(device)
    if row.must_move > MOST_MEMORY * memory:
        raise InvalidValueError(f"moves {row.must_move / 1e9:.1f} GB, of {memory / 1e9:.1f} GB available")
    # Large inputs are made where they are wanted; a CPU would take longer to draw them than to time all the rest.
    with device:
        made = subject.make(row.shape, dtype)
    inputs = rotation.to_device(made, device)
    ways = _agreeing_ways(row, subject, inputs, peers)
    contenders = _contenders(row, subject, inputs, ways, device)
    in_turns([contender for _, contender in contenders], clock, seconds)
    row.measured = [Measured(one.name, kind, one.stats(), one.samples) for kind, one in contenders]


def _agreeing_ways(row: Row, subject: Subject, inputs: Any, peers: Mapping[str, Way]) -> list[tuple[str, Way]]:
    """The ways that can run here. All give what ours gives, or the row fails; a peer that does not is left out."""
    expected = subject.compared(inputs, subject.ours(inputs))
    candidates = [("plain", way) for way in subject.plain]
    if subject.reference is not None:
        candidates.append(("reference", Way(name="reference", call=subject.reference, unfit=_too_slow)))
    candidates += [("peer", way) for way in peers.values()]
    ways: list[tuple[str, Way]] = []
    for kind, way in candidates:
        reason = way.unfit(row.shape)
        if reason is None:
            try:
                own = inputs if way.prepare is None else way.prepare(inputs)
                given = subject.compared(inputs, way.finish(own, way.call(own)))
            # A way that cannot run here (a dtype it does not know) is left out; what ours cannot do fails the row.
            except Exception as error:
                reason = one_line(error)
        if reason is None:
            difference, allowed = _difference(expected, given, subject, row.dtype)
            if difference > allowed:
                reason = f"differs from ours: relative error {difference:.1e}, allowed {allowed:.0e}"
                if kind != "peer":
                    raise ParityError(f"{way.name} {reason}")
            elif kind != "peer":
                row.relative_error = max(difference, row.relative_error or 0.0)
        if reason is None:
            ways.append((kind, way))
        else:
            row.skipped[way.name] = reason
    if row.relative_error is None:
        raise ParityError(f"nothing to compare ours with: {row.skipped}")
    return ways


def _difference(
    expected: Sequence[torch.Tensor], given: Sequence[torch.Tensor], subject: Subject, dtype: str
) -> tuple[float, float]:
    """The largest relative error of the outputs, and what is allowed: nothing for integers."""
    if len(given) != len(expected):
        return float("inf"), 0.0
    table = GRADIENT_TOLERANCE if subject.gradients else TOLERANCE
    allowed = table[getattr(torch, dtype)]
    worst = 0.0
    for one, other in zip(given, expected):
        error = relative_error(one, other)
        if error and not other.is_floating_point():
            return error, 0.0
        worst = max(worst, error)
    return worst, allowed


def _contenders(
    row: Row, subject: Subject, inputs: Any, ways: list[tuple[str, Way]], device: torch.device
) -> list[tuple[str, Contender]]:
    cache, memory = machine.last_level_cache(device), machine.available_memory(device)
    # What a call reads: not the weights of experts that got no row.
    bytes_each = min(rotation.size_of(inputs), row.must_move)
    row.working_set = rotation.plan(bytes_each, cache=cache, memory=memory)
    rotated = subject.rotate(inputs, row.working_set.copies)
    contenders = [("ours", Contender("ours", subject.ours, rotated, always=True))]
    if subject.gemms is not None:
        contenders.append(("yardstick", Contender("GEMMs", subject.gemms, rotated, always=True)))
    elif subject.reads is not None:
        nbytes = sum(tensor.numel() * tensor.element_size() for tensor in subject.reads(inputs))
        sources = rotation.read_sources(nbytes, device, cache=cache, memory=memory)
        contenders.append(("yardstick", Contender("read", torch.amax, sources, always=True)))
    else:
        pairs = rotation.copy_pairs(row.must_move, device, cache=cache, memory=memory)
        contenders.append(("yardstick", Contender("copy", rotation.copy_once, pairs, always=True)))
    for kind, way in ways:
        own = rotated if way.prepare is None else [way.prepare(each) for each in rotated]
        contenders.append((kind, Contender(way.name, way.call, own)))
    return contenders


def _too_slow(shape: Shape) -> str | None:
    return None if shape.rows <= REFERENCE_SLOTS else f"a Python loop over {shape.rows} slots, limit {REFERENCE_SLOTS}"
