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
import json
import shlex
import sys
from pathlib import Path
from typing import Any

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist

from benchmarks import traces
from benchmarks.held_out import held_out, summary
from benchmarks.replay import trace
from benchmarks.setting import Setting
from tutelx.bench import machine
from tutelx.env import local_world_size
from tutelx.errors import InvalidValueError
from tutelx.tuner.grid import World
from tutelx.tuner.shapes import Shape


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
            found = {**summary(rows), "rows": rows}
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
