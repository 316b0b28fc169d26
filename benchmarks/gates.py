"""Every gate trains the demo's language model on two ranks: final loss, drop rate, load CV, step time.

    python benchmarks/gates.py --json benchmarks/results/gates/cpu.json

starts the ranks itself (gloo, data parallel), trains one model a gate over the same batches from the same seed, and
prints a table. Exit code 1 if a loss did not fall. The capacity factor is 1.25 for all gates but expert choice, whose
capacity is its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from tutelx import Capacity, MoE, SharedExperts, gates, structure
from tutelx.bench import machine
from tutelx.demo.model import FeedForward, LanguageModel, build
from tutelx.demo.settings import Settings
from tutelx.demo.text import Batches, load
from tutelx.errors import InvalidValueError

WINDOW = 10  # steps that the first and the final figures are means of
SETTINGS = Settings(steps=100, experts=8, top_k=2, dim=64, layers=2, hidden=64, batch=16, seq=64)
Generator = torch.Generator


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One row of the table. gate: its configuration; what it draws comes from the generator.

    layer: what else the MoE layer is given. around: what is built around it, [dim, hidden] -> the module.
    """

    gate: Callable[[Generator], gates.GateConfig]
    layer: dict[str, Any]
    around: Callable[[MoE, int, int], nn.Module] = lambda moe, dim, hidden: moe


def _entry(gate: Callable[[Generator], gates.GateConfig], factor: float | None = 1.25, **arguments: Any) -> Entry:
    capacity = Capacity.dropless() if factor is None else Capacity.fixed(factor)
    return Entry(gate=gate, layer={"capacity": capacity, **arguments})


ENTRIES: dict[str, Entry] = {
    "TopK": _entry(lambda g: gates.TopK(k=2)),
    "TopK, batch-prioritised": _entry(lambda g: gates.TopK(k=2), batch_prioritized=True),
    "TopK + shared expert (DeepSeekMoE)": Entry(
        gate=lambda g: gates.TopK(k=2, normalize=False),
        layer={"capacity": Capacity.fixed(1.25)},
        around=lambda moe, dim, hidden: SharedExperts(moe, FeedForward(dim, hidden)),
    ),
    "NoisyTopK": _entry(lambda g: gates.NoisyTopK(k=2, group=dist.group.WORLD, generator=g)),
    "GShardTop2": _entry(lambda g: gates.GShardTop2(group_size=256, generator=g)),
    "Switch": _entry(lambda g: gates.Switch(generator=g)),
    "Switch, rerouting": _entry(lambda g: gates.Switch(reroute=7, generator=g)),
    "STMoE": _entry(lambda g: gates.STMoE(generator=g)),
    "Cosine": _entry(lambda g: gates.Cosine(k=2)),
    "ExpertChoice": _entry(lambda g: gates.ExpertChoice(k=2), factor=None),
    "GroupLimited (DeepSeek-V2)": _entry(lambda g: gates.GroupLimited(k=2, num_groups=4, kept_groups=2, scale=2.0)),
    "BiasBalanced (DeepSeek-V3)": _entry(
        lambda g: gates.BiasBalanced(k=2, num_groups=4, kept_groups=2, gamma=0.01, sequence_length=SETTINGS.seq)
    ),
    "TopP": _entry(lambda g: gates.TopP(p=0.4, k=4)),
    "Hierarchical": _entry(
        lambda g: gates.Hierarchical(
            num_groups=4, kept_groups=2, k_inside=1, noisy=True, group=dist.group.WORLD, generator=g
        )
    ),
}


@dataclass(frozen=True, kw_only=True)
class Result:
    """drop_rate, load_cv: of the last steps, mean over layers; the load is that of both ranks, before any drop.

    step_seconds: the median, of the slower rank. losses: of each step, mean over ranks, without auxiliary losses.
    """

    gate: str
    first_loss: float
    final_loss: float
    drop_rate: float
    load_cv: float
    step_seconds: float
    losses: list[float]

    @property
    def fell(self) -> bool:
        return self.final_loss < self.first_loss


def model_of(entry: Entry, settings: Settings, rank: int) -> LanguageModel:
    """The demo's model with its MoE layers built by tutelx. Parameters are those of the seed on every rank."""
    model = build(settings)
    generator = torch.Generator().manual_seed(1000 * settings.seed + rank)
    for block in model.blocks:
        moe = MoE(settings.dim, settings.hidden, settings.experts, gate=entry.gate(generator), **entry.layer)
        block.moe = entry.around(moe, settings.dim, settings.hidden)
    return model


def train(name: str, settings: Settings, rank: int, ranks: int) -> Result:
    torch.manual_seed(settings.seed)
    model = model_of(ENTRIES[name], settings, rank)
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, fused=True)
    batches = Batches(load(settings).training, settings, settings.steps * ranks, seed=settings.seed)
    layers = [layer for _, layer in structure.moe_layers(model)]
    losses, seconds = torch.zeros(settings.steps), torch.zeros(settings.steps)
    loads = torch.zeros(len(layers), settings.experts)
    drops = []
    for step in range(settings.steps):
        inputs, targets = batches[step * ranks + rank]
        dist.barrier()
        begin = time.perf_counter()
        optimizer.zero_grad()
        loss = F.cross_entropy(parallel(inputs).flatten(0, 1), targets.flatten())
        (loss + structure.aux_loss(model)).backward()
        optimizer.step()
        gates.update_biases(model, group=dist.group.WORLD)
        losses[step], seconds[step] = loss.detach(), time.perf_counter() - begin
        if step >= settings.steps - WINDOW:
            for i, layer in enumerate(layers):
                assert layer.stats is not None
                loads[i] += layer.stats.tokens_per_expert
                drops.append(layer.stats.drop_rate)
    drop = torch.tensor(statistics.fmean(drops))
    for total in (losses, loads, drop):
        dist.all_reduce(total)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    losses /= ranks
    window = min(WINDOW, max(1, settings.steps // 2))
    return Result(
        gate=name,
        first_loss=losses[:window].mean().item(),
        final_loss=losses[-window:].mean().item(),
        drop_rate=drop.item() / ranks,
        load_cv=(loads.std(dim=1, correction=0) / loads.mean(dim=1)).mean().item(),
        step_seconds=seconds.median().item(),
        losses=[round(value, 4) for value in losses.tolist()],
    )


def _rank(rank: int, ranks: int, store: str, names: list[str], settings: Settings, out: Any) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks, timeout=timedelta(minutes=5)
    )
    for name in names:
        result = train(name, settings, rank, ranks)
        if rank == 0:
            out.put(result)
    dist.destroy_process_group()


def run(names: list[str], settings: Settings, ranks: int, report: Callable[[Result], None]) -> list[Result]:
    """Trains every gate on all ranks; `report` is called with each result as it comes."""
    context = mp.get_context("spawn")
    out = context.SimpleQueue()
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as folder:
        arguments = (ranks, str(Path(folder) / "store"), names, settings, out)
        started = mp.spawn(_rank, args=arguments, nprocs=ranks, join=False)
        while len(results) < len(names):
            # A rank that raises ends the others and raises here.
            finished = started.join(timeout=0.1)
            while not out.empty():
                results.append(out.get())
                report(results[-1])
            if finished:
                break
        while not started.join():
            pass
    return results


def table(results: list[Result]) -> str:
    lines = ["| Gate | Final loss | Drop rate | Load CV | Step (ms) |", "|---|---|---|---|---|"]
    for each in results:
        row = (each.gate, f"{each.final_loss:.3f}", f"{each.drop_rate:.1%}", f"{each.load_cv:.2f}")
        lines.append(f"| {' | '.join(row)} | {1000 * each.step_seconds:.1f} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gate", action="append", metavar="NAME", help=f"repeatable, of: {'; '.join(ENTRIES)}")
    parser.add_argument("--steps", type=int, default=SETTINGS.steps)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    args = parser.parse_args(arguments)
    names = args.gate or list(ENTRIES)
    if unknown := [name for name in names if name not in ENTRIES]:
        raise InvalidValueError(f"gate {unknown[0]!r} is none of {'; '.join(ENTRIES)}")
    if args.ranks < 1:
        raise InvalidValueError(f"ranks={args.ranks} must be at least 1")
    settings = Settings(**{**asdict(SETTINGS), "steps": args.steps})

    def report(result: Result) -> None:
        print(f"{result.gate}: loss {result.first_loss:.3f} -> {result.final_loss:.3f}", file=sys.stderr, flush=True)

    results = run(names, settings, args.ranks, report)
    print(table(results))
    if args.json is not None:
        record = {
            "kind": "tutelx gates",
            "command": ["benchmarks/gates.py", *(sys.argv[1:] if arguments is None else arguments)],
            "machine": machine.describe(torch.device("cpu"), threads=1),
            "ranks": args.ranks,
            "settings": asdict(settings),
            "rows": [asdict(result) for result in results],
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0 if all(result.fell for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
