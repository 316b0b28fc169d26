"""`tutelx bench pipeline` on each rank: joins the others, measures, and the first of them shows it."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from tutelx.bench import machine, record
from tutelx.bench.pipeline import PipelineResult, PipelineSettings, measure
from tutelx.bench.tables import seconds
from tutelx.env import local_rank, missing_rendezvous
from tutelx.errors import InvalidValueError


def run(settings: PipelineSettings, path: Path | None, device_type: str | None, console: Console) -> int:
    if missing := missing_rendezvous():
        raise InvalidValueError(
            f"pipeline runs on several ranks, but {', '.join(missing)} is not set: start it with torchrun, or on one"
            " machine with benchmarks/cluster.py"
        )
    if device_type == "cuda" or (device_type is None and torch.cuda.is_available()):
        device = torch.device("cuda", local_rank())
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        found = measure(settings, dist.group.WORLD, device)  # type: ignore[arg-type]
        if dist.get_rank() == 0:
            _show(settings, found, console)
            if path is not None:
                _write(settings, found, device, path)
    finally:
        dist.destroy_process_group()
    return 0


def _show(settings: PipelineSettings, found: PipelineResult, console: Console) -> None:
    console.print(
        f"pipeline on {found.world} ranks: T{settings.tokens} a rank, D{settings.model_dim} K{settings.top_k}"
        f" E{found.num_experts} H{found.hidden_dim} {settings.dtype}, forward and backward, slowest rank"
    )
    rate = found.exchange_bytes / found.exchange.median / 1e6
    console.print(f"experts alone   {seconds(found.compute.median)} (IQR {seconds(found.compute.iqr)})")
    console.print(
        f"exchange alone  {seconds(found.exchange.median)} (IQR {seconds(found.exchange.iqr)}),"
        f" {found.exchange_bytes / 1e6:.3g} MB a rank, {rate:.3g} MB/s"
    )
    table = Table(box=None, pad_edge=False)
    for name in ("chunks", "layer", "IQR", "hidden", "of the smaller"):
        table.add_column(name, justify="right")
    for degree, stats in found.layer.items():
        hidden = ("", "") if degree == 1 else (f"{found.hidden(degree) * 1e3:.3g} ms", f"{found.share(degree):.0%}")
        table.add_row(str(degree), seconds(stats.median), seconds(stats.iqr), *hidden)
    console.print(table)
    console.print(f"{found.layer[1].n} samples of each, in turns; hidden = serial - pipelined")


def _write(settings: PipelineSettings, found: PipelineResult, device: torch.device, path: Path) -> None:
    run = {
        "schema": record.SCHEMA,
        "kind": "tutelx bench pipeline",
        "command": ["tutelx", *map(shlex.quote, sys.argv[1:])],
        "machine": machine.describe(device, threads=settings.threads),
        "tokens": settings.tokens,
        "model_dim": settings.model_dim,
        "top_k": settings.top_k,
        "dtype": settings.dtype,
        **found.as_json(),
    }
    try:
        path.write_text(json.dumps(run, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise InvalidValueError(f"{str(path)!r} cannot be written: {error.strerror}") from None
