"""Time every op: against a copy of the bytes that must move, against plain torch, against other libraries."""

from __future__ import annotations

import argparse
from pathlib import Path

from tutelx.bench import shapes
from tutelx.bench.settings import DEVICES, DTYPES, GATES, OPS, PEERS, QUICK_PEERS, Settings, chosen_ops
from tutelx.cli._interrupts import held_interrupts
from tutelx.errors import InvalidValueError

NAME = "bench"
PIPELINE = "pipeline"
_PIPELINE_SIZES = {"T": "tokens", "D": "model_dim", "K": "top_k", "E": "num_experts", "H": "hidden_dim"}
HELP = "time the operators against copies, plain torch and other libraries"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "ops",
        nargs="*",
        metavar="op",
        help=f"of {', '.join(OPS)} (default: all), or {', '.join(GATES)}; gate stands for the op and all of these."
        f" {PIPELINE}, alone: what pipelining hides, on the ranks of torchrun or benchmarks/cluster.py",
    )
    parser.add_argument("--device", choices=DEVICES, help="default: cuda if torch finds one, else cpu")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="repeatable (default: float32)")
    parser.add_argument(
        "--sizes",
        action="append",
        metavar="SIZES",
        help=f"repeatable: {', '.join(shapes.SETS)}, or a list such as T=8192,D=1024,K=2,E=64,H=256, of which what is"
        f" left out is {shapes.Shape()} (default: default)",
    )
    parser.add_argument(
        "--peers",
        metavar="NAMES",
        default="all",
        help=f"all ({','.join(QUICK_PEERS)}), none, or some of {','.join(PEERS)} (default: all)",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="of torch on the CPU (default: torch's own choice)")
    parser.add_argument("--seconds", type=float, default=2.0, metavar="S", help="timing of one row (default: 2)")
    parser.add_argument("--json", "--save", dest="json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the rows there")
    parser.add_argument("--against", type=Path, metavar="FILE", help="compare with a run saved before")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1.15,
        metavar="RATIO",
        help="--against fails where a row is slower by more, relative to the copy or the matrix products of each run"
        " (default: 1.15)",
    )


def run(args: argparse.Namespace) -> int:
    if PIPELINE in args.ops:
        return _run_pipeline(args)
    peers = {"all": QUICK_PEERS, "none": ()}.get(args.peers, tuple(args.peers.split(",")))
    settings = Settings(
        ops=chosen_ops(args.ops),
        shapes=shapes.parse(args.sizes or ["default"]),
        dtypes=tuple(dict.fromkeys(args.dtype or ["float32"])),
        peers=peers,
        device=args.device,
        seconds=args.seconds,
        threads=args.threads,
    )

    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 140  # a file or a pipe has no width of its own
    # Half an import cannot be continued, so an interrupt waits for it.
    with console.status("loading torch"), held_interrupts():
        from tutelx.cli import _bench_run
    files = _bench_run.Files(json=args.json, plot=args.plot, against=args.against, tolerance=args.tolerance)
    return _bench_run.run(settings, files, console)


def _run_pipeline(args: argparse.Namespace) -> int:
    if len(args.ops) > 1:
        raise InvalidValueError(f"{PIPELINE} runs alone, not with {', '.join(set(args.ops) - {PIPELINE})}")
    for name in ("plot", "against"):
        if getattr(args, name) is not None:
            raise InvalidValueError(f"--{name} is not for {PIPELINE}")

    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    with held_interrupts():
        from tutelx.bench.pipeline import PipelineSettings
        from tutelx.cli import _bench_pipeline
    sizes = shapes.parse_sizes(args.sizes[0]) if args.sizes else {}
    given = {name: sizes[size] for size, name in _PIPELINE_SIZES.items() if size in sizes}
    settings = PipelineSettings(
        **given, dtype=(args.dtype or ["float32"])[0], seconds=args.seconds, threads=args.threads
    )
    return _bench_pipeline.run(settings, args.json, args.device, console)
