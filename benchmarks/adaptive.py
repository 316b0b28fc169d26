"""What the scheduler's choice is worth, on the ranks of torchrun or benchmarks/cluster.py.

    tutelx tune ... --db DB                                           first, on the same ranks
    python benchmarks/adaptive.py held-out --db DB --json FILE        workloads between those that were tuned
    python benchmarks/adaptive.py trace FILE --db DB --json FILE      a trace of benchmarks/traces.py

held-out times every plan of each workload (`tutelx.tuner`) and compares the one that the scheduler chooses with the
best and with the default. trace runs every call of a trace under each plan and under the scheduler, in turns: adaptive
against the oracle, which takes the best plan of each call, and against the best plan that never changes. The oracle is
told twice: by the least median of each call, which noise makes too small, and by the plans found best in other rounds.
Times are forward and backward, the slowest rank's; medians of the rounds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shlex
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist

from benchmarks import traces
from tutelx import Plan, Routing, Scheduler
from tutelx.bench import machine
from tutelx.env import local_world_size
from tutelx.errors import InvalidValueError
from tutelx.tuner.cases import Subject
from tutelx.tuner.grid import World, workload
from tutelx.tuner.machine import Machine
from tutelx.tuner.measure import Options, measure
from tutelx.tuner.shapes import Shape
from tutelx.tuning.records import StoredPlan
from tutelx.tuning.space import legal_plans
from tutelx.types import Decision, Workload


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A layer and the ranks that share it."""

    shape: Shape
    world: World
    group: dist.ProcessGroup
    db: Path

    @property
    def subject(self) -> Subject:
        return Subject(
            shape=self.shape,
            group=self.group,
            ranks_per_node=self.world.ranks_per_node,
            device=torch.device(self.world.device),
            seed=0,
        )


def held_out(setting: Setting, tokens: Sequence[int], top_k: Sequence[int], factors: Sequence[float], seconds: float):
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


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
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


def main() -> int:
    args = _arguments()
    torch.set_num_threads(args.threads)
    dist.init_process_group("gloo")
    try:
        group = dist.group.WORLD
        assert group is not None
        world = World(threads=args.threads, world=dist.get_world_size(), ranks_per_node=local_world_size())
        shape = Shape(model_dim=args.model_dim, hidden_dim=args.hidden_dim, num_experts=args.num_experts)
        setting = Setting(shape=shape, world=world, group=group, db=args.db)
        if args.what == "held-out":
            rows = []
            for row in held_out(setting, args.tokens, args.top_k, args.capacity, args.seconds):
                rows.append(row)
                if dist.get_rank() == 0:
                    sys.stdout.write(json.dumps(row) + "\n")
                    sys.stdout.flush()
            found = {**_summary(rows), "rows": rows}
        else:
            found = trace(setting, traces.read(args.file)[: args.calls], args.scale, args.rounds)
        if dist.get_rank() == 0:
            short = {key: value for key, value in found.items() if key not in ("rows", "samples")}
            sys.stdout.write(json.dumps(short, indent=1) + "\n")
            if args.json is not None:
                _write(args, found, world)
    finally:
        dist.destroy_process_group()
    return 0


def _write(args: argparse.Namespace, found: dict[str, Any], world: World) -> None:
    run = {
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine.describe(torch.device("cpu"), threads=args.threads),
        "world": world.world,
        "ranks_per_node": world.ranks_per_node,
        "links": args.links,
        **found,
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(_text(run), encoding="utf-8")


def _text(run: dict[str, Any]) -> str:
    """As JSON, the samples of one call a line, to ten microseconds."""
    samples = run.pop("samples", None)
    text = json.dumps(run, indent=1, allow_nan=False)
    if samples is not None:
        rounded = [{name: [round(s, 5) for s in times] for name, times in sample.items()} for sample in samples]
        lines = ",\n".join("  " + json.dumps(sample) for sample in rounded)
        text = text.removesuffix("\n}") + f',\n "samples": [\n{lines}\n ]\n}}'
    return text + "\n"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    for name in ("held-out", "trace"):
        command = commands.add_parser(name)
        if name == "trace":
            command.add_argument("file", type=Path)
            command.add_argument("--calls", type=int, help="only so many")
            command.add_argument("--rounds", type=int, default=3)
            command.add_argument("--scale", type=float, default=1.0, help="tokens of a rank for each of the trace's")
        else:
            command.add_argument("--tokens", type=_numbers, required=True, help="of a rank")
            command.add_argument("--top-k", type=_numbers, default=[2, 3])
            command.add_argument("--capacity", type=_numbers, default=[1.4, 1.7, 2.8])
            command.add_argument("--seconds", type=float, default=4.0, help="of timing one workload's plans")
        command.add_argument("--db", type=Path, required=True)
        command.add_argument("--json", type=Path)
        command.add_argument("--model-dim", type=int, default=256)
        command.add_argument("--hidden-dim", type=int, default=256)
        command.add_argument("--num-experts", type=int, default=8)
        command.add_argument("--threads", type=int, default=1)
        command.add_argument("--links", default="", help="how they are shaped, for the record")
    return parser.parse_args()


def _numbers(text: str) -> list[Any]:
    try:
        return [float(part) if "." in part else int(part) for part in text.split(",")]
    except ValueError:
        raise InvalidValueError(f"{text!r} is no list of numbers") from None


if __name__ == "__main__":
    sys.exit(main())
