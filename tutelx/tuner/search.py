"""Tuning: every workload of a grid, one after the other, into a database."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
import torch.distributed as dist

from tutelx.errors import InvalidValueError, TutelxError
from tutelx.planner import RulePlanner
from tutelx.tuner.cases import Subject
from tutelx.tuner.grid import World
from tutelx.tuner.machine import Machine
from tutelx.tuner.measure import Interrupted, Options, measure
from tutelx.tuner.shapes import Shape
from tutelx.tuner.together import Clock, Together
from tutelx.tuning.cost import CostModel
from tutelx.tuning.key import Key
from tutelx.tuning.records import Record, StoredPlan
from tutelx.tuning.space import MARGIN, legal_plans, prune
from tutelx.types import Plan, Workload

_log = logging.getLogger("tutelx")


class Store(Protocol):
    """Where records are kept, of this rank."""

    def known(self, key: Key, machine: Machine) -> Record | None:
        """What was measured for the key on this machine with this software; None if nothing was."""

    def add(self, record: Record) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Search:
    """What is asked for.

    budget: seconds for everything; None: as long as it takes. The workload that is being measured when it ends is
        finished.
    margin: see :func:`tutelx.tuning.space.prune`; exhaustive: all plans of the space, none pruned.
    cost_model: None prunes nothing.
    """

    workloads: Sequence[Workload]
    options: Options
    exhaustive: bool = False
    margin: float = MARGIN
    budget: float | None = None
    cost_model: CostModel | None = None

    def __post_init__(self) -> None:
        if not self.workloads:
            raise InvalidValueError("there is nothing to tune: no workloads")
        if not (self.margin >= 1 and math.isfinite(self.margin)):
            raise InvalidValueError(f"margin={self.margin} must be at least 1")
        if self.budget is not None and not self.budget > 0:
            raise InvalidValueError(f"budget={self.budget} must be positive")

    @property
    def pruned(self) -> float | None:
        """The margin, where something is pruned."""
        return None if self.exhaustive or self.cost_model is None else self.margin

    def space(self, workload: Workload) -> list[Plan]:
        """The rules' plan first."""
        default = RulePlanner().plan(workload).plan
        return legal_plans(workload, default=default, exhaustive=self.exhaustive)

    def plans(self, workload: Workload, together: Together) -> list[Plan]:
        """What of the space is measured. Over ranks what rank 0's cost model leaves: another's may know other rates."""
        plans = self.space(workload)
        if self.pruned is None or self.cost_model is None:
            return plans
        kept = set(prune(plans, workload, self.cost_model, self.pruned))
        chosen = together.first([plan in kept for plan in plans])
        return [plan for plan, keep in zip(plans, chosen) if keep]


@dataclass(kw_only=True)
class Found:
    """What a search has come to. records: of all workloads that are known now, in their order; measured: how many of
    them it measured itself. left: workloads that it did not come to. complete: it was neither interrupted nor out of
    time. failed: what could not be measured, and why."""

    records: list[Record] = field(default_factory=list)
    measured: int = 0
    left: int = 0
    interrupted: bool = False
    failed: dict[Key, str] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return not self.left and not self.interrupted


def search(
    what: Search,
    store: Store,
    machine: Machine,
    *,
    group: dist.ProcessGroup | None = None,
    before: Callable[[Workload], None] = lambda workload: None,
    after: Callable[[Record | None, bool], None] = lambda record, measured: None,
) -> Found:
    """Measures what the store does not know yet, and keeps each record as soon as it is there.

    Over ranks all must call with the same workloads; only rank 0's store is asked and written.

    before, after: told of each workload, and of its record and whether it was measured just now.
    """
    found, together = Found(), Together(group, machine.device)
    clock, options = Clock(together), replace(what.options, margin=what.pruned)
    subject: Subject | None = None
    for n, workload in enumerate(what.workloads):
        key = Key.of(workload)
        known = store.known(key, machine) if together.rank == 0 else None
        if known is not None and not covers(known, what.space(workload), what.pruned):
            known = None
        [skip] = together.first([known is not None])
        if not skip and what.budget is not None and clock.elapsed() >= what.budget:
            found.left += 1
            continue
        before(workload)
        if skip:
            if known is not None:
                found.records.append(known)
            after(known, False)
            continue
        shape = Shape.of(workload)
        if subject is None or subject.shape != shape:
            subject = None  # the last one's weights go before the next one's come
        try:
            if subject is None:
                subject = Subject(
                    shape=shape,
                    group=group,
                    ranks_per_node=workload.ranks_per_node,
                    device=machine.device,
                    seed=what.options.seed,
                )
            record = measure(subject, workload, what.plans(workload, together), machine, options)
        except Interrupted:
            found.interrupted, found.left = True, found.left + len(what.workloads) - n
            return found
        except (MemoryError, RuntimeError) as error:
            # Over ranks the process group is of no further use; alone, the next workload may be smaller.
            if group is not None or isinstance(error, TutelxError):
                raise
            found.failed[key] = (str(error).strip().splitlines() or [type(error).__name__])[0]
            _log.warning("tune: %s could not be measured: %s", key, found.failed[key])
            after(None, False)
            continue
        if together.rank == 0:
            store.add(record)
        found.records.append(record)
        found.measured += 1
        after(record, True)
    return found


def covers(record: Record, plans: Iterable[Plan], margin: float | None) -> bool:
    """Whether a search of these plans, the rules' plan first, has nothing to add to the record: all are in it, or what
    is not was pruned by this margin or a wider one. What is pruned may differ from day to day, as the model learns."""
    default, *others = plans
    measured = {candidate.plan for candidate in record.candidates}
    if {StoredPlan.of(plan, by_rule=default) for plan in (default, *others)} <= measured:
        return True
    try:
        return margin is not None and float(record.provenance["margin"]) >= margin
    except (KeyError, ValueError):
        return False


def world_here(device: torch.device, group: dist.ProcessGroup | None) -> World:
    """The fewest threads of a rank, and how many ranks sit on a node, as a layer sees it."""
    if group is None:
        return World(device=device.type, threads=torch.get_num_threads())
    from tutelx.comm.mesh import as_mesh

    mesh = as_mesh(group)
    assert mesh is not None
    fewest = -Together(group, device).most([-torch.get_num_threads()])[0]
    return World(device=device.type, threads=int(fewest), world=mesh.world, ranks_per_node=mesh.ranks_per_node)
