"""One place where plans are asked for: this process, or one group of ranks that has joined."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from tutelx.scheduler.answers import Answer, Knowledge, ruled
from tutelx.scheduler.explore import Exploration, Exploring, Reduce, Turn, Watch
from tutelx.scheduler.memo import Bucket, Memo, bucket_of
from tutelx.stopwatch import in_backward, is_captured, settle
from tutelx.tuning.answer import can_run
from tutelx.tuning.key import Key
from tutelx.tuning.records import Candidate, StoredPlan
from tutelx.types import Decision, Workload

Mode = Literal["lookup", "online", "fixed"]
Finished = Callable[[Workload, Sequence[Candidate], StoredPlan], None]

_MOST_EXPLORED = 1024  # buckets at a time
_log = logging.getLogger("tutelx")


@dataclass(frozen=True, kw_only=True)
class Timed(Decision):
    """A decision whose call is timed. turn: who wants to know."""

    turn: Turn | Watch


@dataclass(slots=True)
class _Entry:
    """What the memo holds. live: what this bucket's calls are counted for, in mode "online"."""

    answer: Answer
    live: Exploration | Watch | None = None
    state: Bucket = ()


class Planning:
    """Answers, remembers and explores. All that it does follows from the workloads and, over ranks, from what `reduce`
    gives, so that equal calls have equal answers on all ranks.

    knowledge: of the kind of device, "cpu" or "cuda".
    reduce: the greatest values of all ranks.
    finished: is told of every exploration that ended: the workload, what was measured, and the default.
    """

    def __init__(
        self,
        mode: Mode,
        knowledge: Callable[[str], Knowledge],
        *,
        exploring: Exploring,
        reduce: Reduce = list,
        finished: Finished | None = None,
    ) -> None:
        self.mode, self._knowledge = mode, knowledge
        self._exploring, self._reduce, self._finished = exploring, reduce, finished
        self._bucket: Callable[[Workload], Bucket] = _shape_of if mode == "fixed" else bucket_of
        self._memo: Memo[_Entry] = Memo()
        self._times: Memo[tuple[float | None]] = Memo()
        self._live: dict[Bucket, Exploration | Watch] = {}
        self._settled: dict[Bucket, tuple[StoredPlan, Answer]] = {}
        self._open = 0

    @property
    def same_on_all_ranks(self) -> bool:
        """What is being tried is compared on every call: ranks may notice the end of a step differently."""
        return self._open == 0

    @property
    def wants_time(self) -> bool:
        return self.mode == "online"

    def seconds(self, workload: Workload) -> float | None:
        """What such a call takes with the plan that it would get: as measured, else as predicted, else None."""
        bucket = bucket_of(workload)
        found = self._times.get(bucket)
        if found is None:
            answer = self.answer(workload)
            found = (answer.predicted if answer.measured is None else answer.measured,)
            self._times.keep(bucket, found)
        return found[0]

    def plan(self, workload: Workload) -> Decision:
        bucket = self._bucket(workload)
        entry = self._memo.get(bucket)
        if entry is None:
            entry = self._remember(bucket, workload)
        if entry.live is not None and not in_backward() and not is_captured(workload.device):
            return self._timed(entry, bucket, workload)
        return entry.answer.decision(workload)

    def answer(self, workload: Workload) -> Answer:
        """Without remembering it."""
        settled = self._settled.get(_state_of(workload))
        if settled is not None:
            plan, answer = settled[0].plan(ruled(workload)), settled[1]
            return replace(answer, plan=plan) if can_run(plan, workload) else answer
        return self._knowledge(workload.device).answer(workload)

    def _remember(self, bucket: Bucket, workload: Workload) -> _Entry:
        entry = _Entry(answer=self.answer(workload))
        if self.mode == "online":
            entry.state = _state_of(workload)
            entry.live = self._live.get(entry.state) or self._begin(entry, workload)
        self._memo.keep(bucket, entry)
        return entry

    def _begin(self, entry: _Entry, workload: Workload) -> Exploration | Watch | None:
        """What an unseen state is worth: to be explored, or watched where its time is known."""
        if entry.answer.settled:
            if entry.answer.measured is None:
                return None
            plan = StoredPlan.of(entry.answer.plan, ruled(workload))
            self._live[entry.state] = Watch(plan, entry.answer.measured, self._exploring)
            return self._live[entry.state]
        if self._open >= _MOST_EXPLORED or not workload.tokens:
            return None
        return self._explore(entry.state, workload, StoredPlan.of(entry.answer.plan, ruled(workload)))

    def _explore(self, state: Bucket, workload: Workload, incumbent: StoredPlan) -> Exploration | None:
        by_rule = ruled(workload)
        plans = [StoredPlan.of(by_rule, by_rule), incumbent]
        plans += [StoredPlan.of(p, by_rule) for p in self._knowledge(workload.device).worth_trying(workload)]
        plans = list(dict.fromkeys(plans))[: self._exploring.most_plans + 1]
        if len(plans) == 1:
            return None
        self._live[state] = found = Exploration(plans, self._exploring, incumbent=plans.index(incumbent))
        self._open += 1
        return found

    def _timed(self, entry: _Entry, bucket: Bucket, workload: Workload) -> Decision:
        live, by_rule = entry.live, ruled(workload)
        if isinstance(live, Watch):
            if live.ask(self._reduce):
                again = self._explore(entry.state, workload, live.plan)
                self._memo.clear()
                if again is not None:
                    _log.info("plan %s takes over %s s, examined again", live.plan, live.expected)
                    return self.plan(workload)
            return Timed(**vars(entry.answer.decision(workload)), turn=live)
        assert isinstance(live, Exploration)
        if workload.device != "cpu" and live.closing(trains=workload.training):
            settle(wait=True)
        turn = live.ask(trains=workload.training, reduce=self._reduce)
        if turn is None:
            self._settle(entry.state, live, workload)
            return self.plan(workload)
        plan = turn.plan.plan(by_rule)
        return Timed(
            plan=plan,
            source="online",
            reason=f"round {live.round + 1} of trying {len(live.active)} plans that were never measured for such calls",
            workload=workload,
            predicted_seconds=self._knowledge(workload.device).predict(workload, plan),
            turn=turn,
        )

    def _settle(self, state: Bucket, exploration: Exploration, workload: Workload) -> None:
        best, candidates = exploration.conclude()
        plan = exploration.plans[best]
        found = next((c for c in candidates if c.plan == plan), None)
        reason = "no time came in" if found is None else f"{found.ratio:.2f} of the default's time in {found.n} rounds"
        answer = Answer(
            plan=plan.plan(ruled(workload)),
            source="online",
            reason=f"{reason}; {len(exploration.plans)} plans were tried",
            measured=None if found is None else found.median,
            settled=True,
        )
        self._settled[state] = plan, answer
        self._live.pop(state, None)
        self._open -= 1
        self._memo.clear()
        self._times.clear()
        if self._finished is not None and candidates:
            self._finished(workload, candidates, exploration.plans[0])


def _state_of(workload: Workload) -> Bucket:
    """What is explored as one."""
    w: Any = workload
    return (Key.of(w), w.layouts, w.expert_kernels, w.shard_degrees, w.all_to_alls)


def _shape_of(workload: Workload) -> Bucket:
    """A layer, whatever tokens it is given."""
    w = workload
    sizes = (w.top_k, w.num_experts, w.model_dim, w.hidden_dim, w.expert_numbers, w.dtype, w.device, w.training)
    return (*sizes, w.threads, w.world, w.layouts, w.expert_kernels, w.shard_degrees, w.all_to_alls)
