"""Times every plan of one workload on a real layer, and makes a record of it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from tutelx.errors import InvalidValueError
from tutelx.tuner.cases import Case, Subject, same_terms
from tutelx.tuner.check import TOLERANCE, Checker, reference
from tutelx.tuner.grid import workload_of
from tutelx.tuner.machine import Machine
from tutelx.tuner.provenance import load_average, provenance
from tutelx.tuner.race import Race
from tutelx.tuner.shapes import Shape
from tutelx.tuner.together import Clock, Together
from tutelx.tuning.key import Key
from tutelx.tuning.nvml import throttled
from tutelx.tuning.records import Candidate, Record, StoredPlan
from tutelx.tuning.space import is_legal, legal_plans
from tutelx.types import Plan, Workload

_log = logging.getLogger("tutelx")

SECONDS = 2.0
HOPELESS_AT_FIRST = 4.0  # times the default's first call, twice: not called again
SHORTEST_SAMPLE, MOST_CALLS = 2e-3, 16  # seconds; shorter calls are timed several at a time
MOST_REPEATS = 3  # of a turn in which the device was throttled


class Interrupted(KeyboardInterrupt):
    """All ranks stop here, as one of them was interrupted."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """seconds: of timing one workload, about. seed: of weights, inputs and the order of turns.

    command: what the record says it was measured with; None: the process's own.
    margin: for the record: with which the plans were pruned; None: they were not.
    stop: asked between calls; True ends the measurement on all ranks with :class:`Interrupted`.
    """

    seconds: float = SECONDS
    seed: int = 0
    command: str | None = None
    margin: float | None = None
    stop: Callable[[], bool] = lambda: False

    def __post_init__(self) -> None:
        if not (self.seconds > 0 and math.isfinite(self.seconds)):
            raise InvalidValueError(f"seconds={self.seconds} must be positive and finite")
        if not 0 <= self.seed < 2**31:
            raise InvalidValueError(f"seed={self.seed} is outside 0..2^31-1")


def measure_key(
    what: Key | Workload,
    plans: Sequence[Plan] | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    seconds: float = SECONDS,
    training: bool | None = None,
    seed: int = 0,
    command: str | None = None,
    machine: Machine | None = None,
) -> Record:
    """Times plans on a real layer with the load of `what`, against the rules' plan, which is always among them.

    Forward and backward where the workload is training, else forward alone. Each plan is first compared with plain
    torch and with the default; one that is wrong is recorded as such and not timed. Over ranks every sample is the
    slowest rank's, and all get the same timings.

    Args:
        what: a workload, measured with just its tokens and load; or a key, measured at the bucket's least.
        plans: default: `legal_plans` of the workload.
        group: the ranks that share the experts, `world` of them, all of which must call alike; None: one process.
        seconds: about how long the timing takes; at least a few turns.
        training: instead of what `what` says.
        command, machine: for the record; found out where they are None.

    Raises:
        InvalidValueError: no built-in layer has this workload, it is another world or device than the one here, or a
            plan cannot run.
        RankMismatchError, RankFailedError: over ranks, on each of them, naming those at fault.
    """
    workload = workload_of(what) if isinstance(what, Key) else what
    if training is not None:
        workload = replace(workload, training=training)
    device = _device(workload, group)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(workload.threads)
        subject = Subject(
            shape=Shape.of(workload),
            group=group if workload.world > 1 else None,
            ranks_per_node=workload.ranks_per_node,
            device=device,
            seed=seed,
        )
        options = Options(seconds=seconds, seed=seed, command=command)
        return measure(subject, workload, plans, machine or Machine.here(device, group), options)
    finally:
        torch.set_num_threads(before)


def measure(
    subject: Subject, workload: Workload, plans: Sequence[Plan] | None, machine: Machine, options: Options
) -> Record:
    """As :func:`measure_key`, on a layer that is there already.

    Raises:
        Interrupted: `options.stop` said so on some rank.
    """
    together = Together(subject.group, subject.device)
    whole = Clock(together)
    case = subject.case(workload)
    heard, default = case.hear()
    if not same_terms(workload, heard):
        raise InvalidValueError(f"the layer was to run {workload}, but it ran {heard}")
    wanted = legal_plans(heard, default=default) if plans is None else plans
    if illegal := [str(plan) for plan in wanted if not is_legal(plan, heard)]:
        raise InvalidValueError(f"{', '.join(illegal)} cannot run {workload}")
    contenders = [default, *(plan for plan in dict.fromkeys(wanted) if plan != default)]
    run = _Run(case, contenders, machine, together, options)
    run.check()
    run.race()
    return Record(
        hardware=machine.hardware,
        key=Key.of(heard),
        default=StoredPlan.of(default, by_rule=default),
        candidates=run.candidates(),
        software=machine.software,
        provenance=provenance(
            command=options.command,
            margin=options.margin,
            seconds=whole.elapsed(),
            samples=run.samples,
            load=run.load_before,
            throttled="not told" if machine.throttling() is None and not run.discarded else run.why,
            discarded=run.discarded,
        ),
    )


class _Run:
    """One workload's plans, from the first call to the last. All ranks go through it in step."""

    def __init__(
        self, case: Case, plans: Sequence[Plan], machine: Machine, together: Together, options: Options
    ) -> None:
        self.case, self.plans, self.machine, self.together, self.options = case, plans, machine, together, options
        self.errors: dict[int, float] = {}
        self.right: list[int] = []  # indices into plans of those that are timed, the default first
        self.first: dict[int, float] = {}  # seconds of the first call, the slowest rank's
        self.discarded, self.reasons = 0, set[str]()  # turns in which a device was throttled, and why, on this rank
        self.load_before = load_average()

    def check(self) -> None:
        checker = Checker(reference(self.case))
        limit = TOLERANCE[getattr(torch, self.case.workload.dtype)]
        for i, plan in enumerate(self.plans):
            self._interruptible()
            error = self._error(i, plan, checker)
            self.errors[i] = error
            if error <= limit or i == 0:
                self.right.append(i)
            if error > limit and self.together.rank == 0:
                _log.warning(
                    "tune: %s is wrong for %s: relative error %.1e, tolerance %.0e",
                    plan,
                    self.case.workload,
                    error,
                    limit,
                )

    def _error(self, i: int, plan: Plan, checker: Checker) -> float:
        self.case.ready()
        self.together.begin()
        y: list[torch.Tensor] = []
        try:
            seconds = self.machine.timed(lambda: y.append(self.case.call(plan)))
        except (RuntimeError, ValueError, MemoryError) as failure:
            # Over ranks the others have been told; alone, the other plans can still be measured.
            if self.together.group is not None or i == 0:
                raise
            _log.warning("tune: %s cannot run %s: %s", plan, self.case.workload, failure)
            return math.inf
        results = {"y": y.pop(), **self.case.gradients()}
        error, self.first[i] = self.together.most([checker.error(results), seconds])
        if i == 0:
            checker.also(results)
        return error

    def race(self) -> None:
        race = Race(len(self.right), seconds=self.options.seconds, seed=self.options.seed)
        calls = max(1, min(MOST_CALLS, int(SHORTEST_SAMPLE / max(self.first[0], 1e-9))))
        for n, i in enumerate(self.right[1:], 1):
            hopeless = HOPELESS_AT_FIRST * self.first[0]
            if self.first[i] > hopeless:
                self._interruptible()
                again = min(self.first[i], *self.together.most([self._timed(self.plans[i], 1)]))
                if again > hopeless:
                    race.stop(n, again, self.first[0])
        clock, repeats = Clock(self.together), 0
        while not race.over(clock.elapsed()):
            order = race.order()
            before = self.machine.throttling()
            samples = [self._timed(self.plans[self.right[n]], calls) for n in order]
            reasons = throttled(before, self.machine.throttling())
            *samples, slow = self.together.most([*samples, bool(reasons)])
            self._interruptible()
            if slow:
                self.discarded += 1
                self.reasons |= set(reasons)
                repeats += 1
                if repeats <= MOST_REPEATS:
                    continue
                raise InvalidValueError(f"a device was throttled in {repeats} turns in a row ({self.why}): let it cool")
            repeats = 0
            race.add(dict(zip(order, samples)))
        self._race = race

    def candidates(self) -> tuple[Candidate, ...]:
        by_rule, found = self.plans[0], []
        runners = dict(zip(self.right, self._race.runners))
        for i, plan in enumerate(self.plans):
            error = self.errors[i] if math.isfinite(self.errors[i]) else None
            stored = StoredPlan.of(plan, by_rule=by_rule)
            runner = runners.get(i)
            if runner is None:
                found.append(
                    Candidate(plan=stored, median=0.0, iqr=0.0, n=0, ratio=0.0, error=error, status="wrong", spread=0.0)
                )
                continue
            wrong = error is None or error > TOLERANCE[getattr(torch, self.case.workload.dtype)]
            found.append(
                Candidate(
                    plan=stored,
                    median=runner.median,
                    iqr=runner.iqr,
                    n=len(runner.seconds),
                    ratio=runner.ratio,
                    error=error,
                    status="wrong" if wrong else "slow" if runner.stopped else "ok",
                    spread=runner.spread if math.isfinite(runner.spread) else 0.0,
                )
            )
        return tuple(found)

    @property
    def why(self) -> str:
        """What throttled a device, as far as this rank knows; "no" if nothing did."""
        return ", ".join(sorted(self.reasons)) or ("on another rank" if self.discarded else "no")

    @property
    def samples(self) -> int:
        return sum(len(runner.seconds) for runner in self._race.runners)

    def _timed(self, plan: Plan, calls: int) -> float:
        """Seconds of one call, the mean of several in a row; this rank's."""
        total = 0.0
        for _ in range(calls):
            self.case.ready()
            self.together.begin()
            total += self.machine.timed(lambda: self.case.call(plan))
        return total / calls

    def _interruptible(self) -> None:
        if self.together.most([self.options.stop()])[0]:
            raise Interrupted


def _device(workload: Workload, group: dist.ProcessGroup | None) -> torch.device:
    world = 1 if group is None else dist.get_world_size(group)
    if workload.world not in (1, world):
        raise InvalidValueError(f"world={workload.world} of the workload, but the group has {world} ranks")
    if workload.device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InvalidValueError(f"device={workload.device!r} of the workload, but torch finds no CUDA device")
    return torch.device("cuda", torch.cuda.current_device())
