"""The plan that the scheduler chooses for workloads between those that were tuned, against the best and the default."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from benchmarks.setting import Setting
from tutelx import Scheduler
from tutelx.tuner.cases import Subject
from tutelx.tuner.grid import workload
from tutelx.tuner.machine import Machine
from tutelx.tuner.measure import Options, measure
from tutelx.tuning.records import StoredPlan
from tutelx.types import Decision, Workload


def held_out(
    setting: Setting, tokens: Sequence[int], top_k: Sequence[int], factors: Sequence[float], seconds: float
) -> Iterator[dict[str, Any]]:
    """One row a workload: seconds of the chosen plan, the best and the default, and the chosen one's tier."""
    device = torch.device(setting.world.device)
    subject, computer = setting.subject, Machine.here(device, setting.group)
    scheduler, rules = Scheduler(setting.db), subject.layer.planner
    for n, k, factor in itertools.product(tokens, top_k, factors):
        if factor * k > setting.shape.num_experts:
            continue
        told = workload(setting.shape, setting.world, n, k, factor, training=True)
        record = measure(subject, told, None, computer, Options(seconds=seconds, command="held-out"))
        subject.layer.planner = scheduler
        decision = _decision(subject, told)
        subject.layer.planner = rules
        default = next(c for c in record.candidates if c.plan == record.default)
        tried = {candidate.plan: candidate for candidate in record.candidates}
        by_rule = record.default.plan(decision.plan)
        chosen = tried.get(StoredPlan.of(decision.plan, by_rule)) or tried.get(StoredPlan.of(decision.plan))
        yield {
            "tokens": n,
            "top_k": k,
            "load_factor": factor,
            "default": str(record.default.plan(decision.plan)),
            "chosen": str(decision.plan),
            "tier": decision.source,
            "best": str(record.best.plan.plan(decision.plan)),
            "default_seconds": default.median,
            "chosen_over_best": None if chosen is None else chosen.ratio / min(c.ratio for c in record.candidates),
            "chosen_over_default": None if chosen is None else chosen.ratio,
            "chosen_iqr": None if chosen is None else chosen.iqr / chosen.median,
        }


def _decision(subject: Subject, told: Workload) -> Decision:
    case = subject.case(told)
    case.ready()
    case.call()
    assert subject.layer.last_decision is not None
    return subject.layer.last_decision


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    known = [row for row in rows if row["chosen_over_best"] is not None]
    over = sorted(row["chosen_over_best"] for row in known)
    return {
        "workloads": len(rows),
        "not_timed": len(rows) - len(known),
        "median_over_best": statistics.median(over),
        "worst_over_best": over[-1],
        "worst_over_default": max(row["chosen_over_default"] for row in known),
        "best_over_default": min(row["chosen_over_default"] for row in known),
    }
