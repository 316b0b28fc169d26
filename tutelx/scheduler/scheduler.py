"""The planner that looks up, remembers, explores and explains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, get_args

import torch

from tutelx import env
from tutelx.errors import InvalidValueError
from tutelx.planner import RulePlanner
from tutelx.scheduler.answers import Lookup as Finder
from tutelx.scheduler.answers import ruled
from tutelx.scheduler.explore import Exploring
from tutelx.scheduler.planning import Mode, Planning, Timed
from tutelx.scheduler.sources import Source
from tutelx.tuning.hardware import Hardware
from tutelx.tuning.links import probe_links
from tutelx.tuning.lookup import Lookup
from tutelx.types import Decision, Plan, Planner, Workload

if TYPE_CHECKING:
    from tutelx.comm.meeting import Meeting

_RULES = RulePlanner()


class Scheduler:
    """Chooses the plan of every call from what was measured; the default planner of all layers.

    A call's workload falls into a bucket (`tutelx.tuning.key`), and a bucket is looked up once: a record of this very
    key, of a near one, of a sibling machine, else a calibrated cost model, else the rules of
    `tutelx.planner.RulePlanner`. `Decision.source` names the tier ("exact", "nearest", "sibling", "model", "default",
    "online", "fixed") and `Decision.reason` says why. Without a database every plan is that of the rules.

    Any number of layers may share one. Over ranks the first call hands rank 0's measurements to all, so that later
    ones need no message; schedulers with other settings on another rank are a RankMismatchError.

    Args:
        db: where the measurements are: None: what was shipped, the site's and the user's; a folder or several, later
            ones counting more, or () for none; a `tutelx.tuning.lookup.Lookup`; or on one process what has its `find`.
        mode: "lookup" answers from the measurements. "online" also tries plans for buckets that were never measured, in
            real steps, of which each is correct whatever its plan; what is found is kept for the process and
            written to the user's database, and watched: a plan that became slower is examined again. "fixed" keeps
            the first answer of every layer shape for ever, or `plan`.
        plan: of mode "fixed", for all layers.
        exploring: how much is tried in mode "online".
        hardware: the machine whose measurements count; default: this one, as it is found to be.

    Raises:
        InvalidValueError: another mode, or a plan in a mode that takes none.
        InvalidTypeError: a `db` that is nothing of that.
    """

    def __init__(
        self,
        db: Finder | str | Path | Sequence[str | Path] | None = None,
        mode: Mode = "lookup",
        *,
        plan: Plan | None = None,
        exploring: Exploring | None = None,
        hardware: Hardware | None = None,
    ) -> None:
        if mode not in get_args(Mode):
            raise InvalidValueError(f"mode={mode!r} is none of {get_args(Mode)}")
        if plan is not None and mode != "fixed":
            raise InvalidValueError(f"plan={plan} was given, but mode={mode!r} chooses plans itself")
        self.mode, self.exploring = mode, exploring or Exploring()
        self.always = plan
        self._source = Source(db, hardware)
        self._lock = Lock()
        self._here: Planning | None = None

    @property
    def wants_time(self) -> bool:
        """Whether calls are to be timed and told to :meth:`observe`."""
        return self.mode == "online"

    same_on_all_ranks = True

    @property
    def steady(self) -> bool:
        return self.mode != "online"

    def plan(self, workload: Workload) -> Decision:
        """The plan of a call; a few microseconds where such a workload was seen before."""
        if torch.compiler.is_compiling():
            return _RULES.plan(workload)
        if self.always is not None:
            reason = "the scheduler was given this plan"
            return Decision(plan=self.always, source="fixed", reason=reason, workload=workload)
        return (self._here or self._open()).plan(workload)

    def observe(self, decision: Decision, seconds: float | None) -> None:
        """What the call of a decision took. None: its backward has begun. Other planners' decisions are passed over."""
        if isinstance(decision, Timed):
            decision.turn.observe(seconds)

    def seconds(self, workload: Workload) -> float | None:
        """What such a call takes with the plan that it would get: as measured, else as predicted, else None."""
        return (self._here or self._open()).seconds(workload)

    def explain(self, workload: Workload) -> str:
        """Which plan, from which tier, and why, without remembering anything."""
        answer = (self._here or self._open()).answer(workload)
        lines = [f"{answer.plan} ({answer.source}): {answer.reason}"]
        if answer.measured is not None:
            lines.append(f"measured: {answer.measured:.3e} s")
        if answer.predicted is not None:
            lines.append(f"predicted: {answer.predicted:.3e} s")
        lines.append(f"the rules would run {ruled(workload)}")
        return "\n".join(lines)

    def _open(self) -> Planning:
        with self._lock:
            if self._here is None:
                self._here = self._planning()
            return self._here

    def join(self, meeting: Meeting) -> Planning:
        """Who plans for a group of ranks, with what rank 0 knows. Called by all of them, once, before the first plan.

        Raises:
            RankMismatchError: their schedulers have different settings.
            RankFailedError: one did not come or failed, such as rank 0 in reading its database.
        """
        meeting.compare(mode=self.mode, **asdict(self.exploring))
        data = meeting.share(lambda: self._source.snapshot(meeting.device.type, meeting.mesh.world))
        with meeting.failures():
            knowledge, linked = self._source.restored(data)
        meeting.compare(ready=True)
        links = None
        if linked or self.mode == "online":
            with meeting.losses():
                links = probe_links(meeting.mesh.group, meeting.mesh.ranks_per_node)
        if linked and links is not None and isinstance(knowledge.lookup, Lookup):
            knowledge.lookup.hardware = links.of(knowledge.lookup.hardware)
        return Planning(
            self.mode,
            lambda device: knowledge,
            exploring=self.exploring,
            reduce=meeting.greatest,
            finished=partial(self._source.keep, links=links) if meeting.rank == 0 else None,
        )

    def _planning(self) -> Planning:
        return Planning(
            self.mode, lru_cache(self._source.knowledge), exploring=self.exploring, finished=self._source.keep
        )

    def __deepcopy__(self, memo: dict) -> Scheduler:
        return self  # copies of a layer learn together

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        if self is _default:
            return default_planner, ()
        source = self._source
        return _rebuilt, (source.places, self.mode, self.always, self.exploring, source.hardware)

    def __repr__(self) -> str:
        return f"Scheduler(mode={self.mode!r})" if self.always is None else f"Scheduler(plan={self.always})"


_default: Scheduler | None = None
_default_lock = Lock()


def default_planner() -> Planner:
    """What layers take that are given no planner: one scheduler of this process, or what TUTELX_PLANNER says.

    Raises:
        InvalidValueError: TUTELX_PLANNER is none of the words that it knows.
    """
    global _default
    kind = env.planner()
    if kind == "rules":
        return _RULES
    with _default_lock:
        if _default is None or _default.mode != kind:
            _default = Scheduler(mode=kind)  # type: ignore[arg-type]
        return _default


def _rebuilt(db: Any, mode: Mode, plan: Plan | None, exploring: Exploring, hardware: Hardware | None) -> Scheduler:
    return Scheduler(db, mode, plan=plan, exploring=exploring, hardware=hardware)
