"""Traces: the load of every layer call of a training run, to be run again under other plans.

    python benchmarks/traces.py benchmarks/traces/demo.jsonl --experts 4 --top-k 1 --steps 200

trains the demo's model, wrapped, and keeps what its monitor wrote of each call, one object a line: step, layer, tokens,
top_k, needed_capacity_factor, and load [E], the slots that asked for each expert. Each step has sequences of another
length, from a third of the demo's to twice as long, as texts have. `--synthetic` writes a square wave instead: balanced
loads of n tokens, then of four times as many.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

import tutelx
from tutelx.demo import model, text
from tutelx.demo.settings import Settings
from tutelx.demo.training import Run
from tutelx.errors import InvalidValueError
from tutelx.monitor import Monitor


@dataclass(frozen=True, kw_only=True)
class Call:
    """One layer call of a trace. load: [E] slots, before any drop."""

    step: int
    layer: str
    tokens: int
    top_k: int
    needed_capacity_factor: float
    load: tuple[int, ...]

    def expert_ids(self, tokens: int) -> torch.Tensor:
        """[tokens, K] int32 with about this load: the same shares of the slots, a token's choices distinct."""
        slots, asked = tokens * self.top_k, sum(self.load)
        # Shares become whole numbers that add up, and no expert gets more slots than there are tokens.
        ends = [min(slots, round(slots * sum(self.load[: e + 1]) / asked)) for e in range(len(self.load))]
        loads = [min(tokens, end - begin) for begin, end in zip([0, *ends], ends)]
        for e in range(len(loads)):
            loads[e] += min(tokens - loads[e], slots - sum(loads))
        experts = torch.repeat_interleave(torch.arange(len(loads)), torch.tensor(loads))
        return experts.view(self.top_k, tokens).T.int().contiguous()


def read(path: Path) -> list[Call]:
    """Raises InvalidValueError where a line is no call."""
    calls = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            found = json.loads(line)
            calls.append(Call(**{**found, "load": tuple(found["load"])}))
        except (ValueError, TypeError, KeyError) as error:
            raise InvalidValueError(f"{path}, line {number}: {error}") from None
    return calls


def write(path: Path, calls: Iterable[Call]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(asdict(call)) + "\n" for call in calls), encoding="utf-8")


def record(settings: Settings) -> list[Call]:
    """Trains the demo's wrapped model on sequences of 1/3 to 2 times the settings' length, evenly in logarithms."""
    longest = replace(settings, seq=2 * settings.seq)
    batches = text.training_batches(text.load(longest), longest)
    lengths = random.Random(settings.seed)
    run = Run("wrapped", tutelx.wrap(model.build(settings), strict=True), settings)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "monitor.jsonl"
        with Monitor(run.model, jsonl=path) as monitor:
            for i in range(len(batches)):
                length = round(longest.seq * 6 ** -lengths.random())
                inputs, targets = batches[i]
                run.step((inputs[:, :length].contiguous(), targets[:, :length].contiguous()))
                monitor.step()
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    names = list(Call.__dataclass_fields__)
    return [Call(**{**{name: line[name] for name in names}, "load": tuple(line["load"])}) for line in lines]


def synthetic(steps: int, num_experts: int, *, tokens: int, period: int = 40) -> list[Call]:
    """Balanced top-1 choices of `tokens` tokens for half of a period, and of four times as many for the other."""
    calls = []
    for step in range(steps):
        now = tokens if step % period < period / 2 else 4 * tokens
        load = tuple(now * (e + 1) // num_experts - now * e // num_experts for e in range(num_experts))
        needed = max(load) * num_experts / now
        calls.append(Call(step=step, layer="moe", tokens=now, top_k=1, needed_capacity_factor=needed, load=load))
    return calls


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--top-k", type=int, default=1)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--synthetic", action="store_true")
    args = parser.parse_args()
    settings = Settings(steps=args.steps, experts=args.experts, top_k=args.top_k, layers=args.layers)
    tokens = settings.batch * settings.seq // 2
    calls = synthetic(args.steps, args.experts, tokens=tokens) if args.synthetic else record(settings)
    write(args.file, calls)
    rows = [max(call.load) for call in calls]
    sys.stdout.write(f"{len(calls)} calls, needed capacity {min(rows)} to {max(rows)} rows\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
