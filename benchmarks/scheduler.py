"""What the scheduler costs: a warm look-up, and its share of a layer call.

    python benchmarks/scheduler.py --json FILE

A database of one record is asked over and over for buckets that it has answered before: alone, and inside a layer
whose calls are timed with the scheduler and with one given plan, in turns. Exit code 1 if a look-up takes 5
microseconds or more, or more than 1% of a call.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from tutelx import MoE, Scheduler
from tutelx.planner import FixedPlanner, RulePlanner
from tutelx.tuning.hardware import Hardware
from tutelx.tuning.key import Key
from tutelx.tuning.lookup import Lookup
from tutelx.tuning.records import Candidate, Record, StoredPlan
from tutelx.tuning.store import Database
from tutelx.types import Workload

MOST_MICROSECONDS = 5.0
MOST_SHARE = 0.01
TOKENS = 512
HERE = Hardware(device="cpu", arch="x86_64", units=1, memory_bytes=1, memory_rate=1.0, cache_bytes=1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float, default=3.0, help="timing of each of the two")
    args = parser.parse_args()

    layer = MoE(512, 1024, 8, planner=RulePlanner())
    x = torch.randn(TOKENS, 512)
    with torch.no_grad():
        layer(x)
    workload = layer.last_decision.workload
    scheduler = Scheduler(Lookup(Database(records=[record(workload)]), HERE))
    tier = scheduler.plan(workload).source

    lookup = _median(lambda: scheduler.plan(workload), args.seconds, batch=1000)
    rules = _median(lambda: RulePlanner().plan(workload), args.seconds / 3, batch=1000)
    call, overhead = in_a_layer(layer, x, scheduler, args.seconds)
    figures: dict[str, Any] = {
        "tier": tier,
        "lookup_us": lookup * 1e6,
        "rules_us": rules * 1e6,
        "call_us": call * 1e6,
        "share": lookup / call,
        "call_over_fixed": overhead,
        "tokens": TOKENS,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "command": " ".join(sys.argv),
    }
    print(f"a warm look-up ({tier}): {lookup * 1e6:.2f} us; the rules: {rules * 1e6:.2f} us")
    print(f"a layer call of {TOKENS} tokens, M=512, H=1024, E=8, K=2, without gradients: {call * 1e6:.0f} us")
    print(f"a look-up is {lookup / call:.2%} of it; calls with one given plan take {1 / overhead:.4f} of its time")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
    return int(not (lookup * 1e6 < MOST_MICROSECONDS and lookup / call < MOST_SHARE))


def record(workload: Workload) -> Record:
    """The default and a plan that is worth half of it."""
    default = StoredPlan(layout="ragged", expert_kernel="tiled")
    best = StoredPlan(layout="padded", expert_kernel="bmm")
    times = {default: 1.0, best: 0.5}
    return Record(
        hardware=HERE,
        key=Key.of(workload),
        default=default,
        candidates=tuple(Candidate(plan=plan, median=t, iqr=0.0, n=9, ratio=t, error=0.0) for plan, t in times.items()),
        software={},
        provenance={"command": "made up"},
    )


def in_a_layer(layer: MoE, x: torch.Tensor, scheduler: Scheduler, seconds: float) -> tuple[float, float]:
    """Seconds of a call with the scheduler, and its time over that with the same plan given once and for all."""
    planners = {"scheduler": scheduler, "fixed": FixedPlanner(scheduler.plan(layer.last_decision.workload).plan)}
    times: dict[str, list[float]] = {name: [] for name in planners}
    end = time.perf_counter() + seconds
    with torch.no_grad():
        while time.perf_counter() < end:
            for name, planner in planners.items():
                layer.planner = planner
                times[name].append(_once(lambda: layer(x), 3))
    ratios = [a / b for a, b in zip(times["scheduler"], times["fixed"])]
    return median(times["scheduler"]), median(ratios)


def _median(function: Callable[[], object], seconds: float, *, batch: int) -> float:
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        times.append(_once(function, batch))
    return median(times)


def _once(function: Callable[[], object], batch: int) -> float:
    begin = time.perf_counter()
    for _ in range(batch):
        function()
    return (time.perf_counter() - begin) / batch


if __name__ == "__main__":
    sys.exit(main())
