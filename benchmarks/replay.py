"""Every call of a trace under each plan and under the scheduler, in turns; adaptive against two oracles."""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import traces
from benchmarks.setting import Setting
from tutelx import Plan, Routing, Scheduler
from tutelx.tuning.space import legal_plans


class Replay:
    """Runs the calls of a trace on this rank, with `scale` times their tokens."""

    def __init__(self, setting: Setting, scale: float, most: int) -> None:
        self.setting, self.scale, self.subject = setting, scale, setting.subject
        self.scheduler, self.rules = Scheduler(setting.db), self.subject.layer.planner
        generator = torch.Generator().manual_seed(dist.get_rank(setting.group))
        sizes = self._scaled(most), setting.shape.model_dim
        self.x_TM, self.grad_TM = (torch.randn(sizes, generator=generator) for _ in range(2))

    def plans(self, call: traces.Call) -> list[Plan]:
        """Every plan across the ranks, each in the layout, kernel and tiles of the default."""
        self.timed(call, None)
        heard = self.subject.planner.heard
        assert heard is not None
        default = self.rules.plan(heard).plan
        plans = legal_plans(heard, default=default)
        return [p for p in plans if (p.layout, p.tile_columns) == (default.layout, default.tile_columns)]

    def timed(self, call: traces.Call, plan: Plan | None) -> float:
        tokens = self._scaled(call.tokens)
        ids, x_TM = call.expert_ids(tokens), self.x_TM[:tokens].requires_grad_()
        weights = torch.full(ids.shape, 1 / call.top_k).requires_grad_()
        layer = self.subject.layer
        for leaf in layer.parameters():
            leaf.grad = None
        self.subject.router.routing = Routing(expert_ids=ids, weights=weights)
        dist.barrier(self.setting.group)
        begin = time.perf_counter()
        layer(x_TM, plan=plan).backward(self.grad_TM[:tokens])
        return time.perf_counter() - begin

    def run(self, calls: Sequence[traces.Call], rounds: int) -> Iterator[tuple[dict[str, list[float]], str]]:
        """For each call the samples of every contender, of this rank, and the plan that the scheduler chose."""
        plans: dict[str, Plan | None] = {_across(plan): plan for plan in self.plans(calls[0])}
        plans["adaptive"] = None
        names = list(plans)
        order = random.Random(0)  # the same on all ranks; what ran just before leaves its mark on the links
        self.subject.layer.planner = self.scheduler
        self.timed(calls[0], None)  # meets the other ranks, once
        for call in calls:
            samples: dict[str, list[float]] = {name: [] for name in names}
            for _ in range(rounds):
                for name in order.sample(names, len(names)):
                    plan = plans[name]
                    self.subject.layer.planner = self.scheduler if plan is None else self.rules
                    samples[name].append(self.timed(call, self._tiled(plan)))
                    if plan is None:
                        decision = self.subject.layer.last_decision
                        assert decision is not None
                        chosen = _across(decision.plan)
            yield samples, chosen

    def _scaled(self, tokens: int) -> int:
        return max(1, round(self.scale * tokens))

    def _tiled(self, plan: Plan | None) -> Plan | None:
        """The tiles of a plan follow the load, as the default's do."""
        heard = self.subject.planner.heard
        if plan is None or heard is None:
            return plan
        rule = self.rules.plan(heard).plan
        return replace(plan, tile_rows=rule.tile_rows, tile_columns=rule.tile_columns)


def trace(setting: Setting, calls: Sequence[traces.Call], scale: float, rounds: int) -> dict[str, Any]:
    samples, chosen = [], Counter()
    replay = Replay(setting, scale, max(call.tokens for call in calls))
    for number, (found, plan) in enumerate(replay.run(calls, rounds), 1):
        names = list(found)
        slowest = torch.tensor([found[name] for name in names], dtype=torch.float64)
        dist.all_reduce(slowest, dist.ReduceOp.MAX, setting.group)
        samples.append(dict(zip(names, slowest.tolist())))
        chosen[plan] += 1
        if number % 50 == 0 and dist.get_rank(setting.group) == 0:
            sys.stderr.write(f"{number} of {len(calls)} calls\n")
    statics = {
        name: sum(statistics.median(sample[name]) for sample in samples) for name in samples[0] if name != "adaptive"
    }
    adaptive = sum(statistics.median(sample["adaptive"]) for sample in samples)
    oracle = sum(min(statistics.median(sample[name]) for name in statics) for sample in samples)
    found_elsewhere = sum(_oracle_of_other_rounds(sample, list(statics)) for sample in samples)
    best = min(statics, key=statics.__getitem__)
    return {
        "calls": len(samples),
        "rounds": rounds,
        "adaptive_seconds": adaptive,
        "oracle_seconds": oracle,
        "oracle_of_other_rounds_seconds": found_elsewhere,
        "static_seconds": statics,
        "best_static": best,
        "adaptive_over_oracle": adaptive / oracle,
        "adaptive_over_oracle_of_other_rounds": adaptive / found_elsewhere,
        "under_best_static": 1 - adaptive / statics[best],
        "oracle_under_best_static": 1 - oracle / statics[best],
        "chosen": dict(chosen),
        "samples": samples,
    }


def _oracle_of_other_rounds(sample: dict[str, list[float]], names: list[str]) -> float:
    """Seconds of one call. The least of several noisy medians is too small by their noise; here each round times the
    plan that was best in the others, so that what chooses and what is timed are not the same samples."""
    rounds = range(len(sample[names[0]]))
    if len(rounds) == 1:
        return min(sample[name][0] for name in names)

    def best_without(i: int) -> str:
        return min(names, key=lambda name: statistics.fmean(sample[name][j] for j in rounds if j != i))

    return statistics.fmean(sample[best_without(i)][i] for i in rounds)


def _across(plan: Plan) -> str:
    if plan.shard_degree == 0:
        return "r0"
    return f"r{plan.shard_degree}/d{plan.pipeline_degree}" + ("/2dh" if plan.all_to_all == "2dh" else "")
