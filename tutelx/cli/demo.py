"""Train a small MoE language model twice, as written and wrapped: parity, losses, speed, plans, and a report."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path

from tutelx.cli._interrupts import held_interrupts
from tutelx.demo.settings import DTYPES, Settings
from tutelx.env import default_omp_wait_policy
from tutelx.errors import InvalidValueError

NAME = "demo"
HELP = "train a small MoE language model, as written and wrapped, side by side"

_FLAGS = {
    "steps": "training steps of each model",
    "experts": "experts a layer",
    "top_k": "experts a token",
    "dim": "model dimension",
    "layers": "transformer blocks",
    "hidden": "hidden dimension of an expert",
    "batch": "sequences a step",
    "seq": "bytes a sequence",
    "lr": "learning rate of AdamW",
    "seed": "of the weights and the batches",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    defaults = {field.name: field.default for field in fields(Settings)}

    def add(name: str, help: str, default: object, **kind: object) -> None:
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, default=default, help=f"{help} (default: {default})", **kind)  # type: ignore[arg-type]

    for name, text in _FLAGS.items():
        kind, metavar = (float, "X") if name == "lr" else (int, "N")
        add(name, text, defaults[name], type=kind, metavar=metavar)
    add("dtype", "of weights and activations", defaults["dtype"], choices=DTYPES)
    parser.add_argument("--text", metavar="FILE", help="train on this file (default: English text that Python carries)")
    add("out", "folder of the report", "tutelx-demo", metavar="DIR")
    add("ranks", "processes of the wrapped run", 1, type=int, metavar="N")


def run(args: argparse.Namespace) -> int:
    settings = Settings(**{field.name: getattr(args, field.name) for field in fields(Settings)})
    if args.ranks < 1:
        raise InvalidValueError(f"ranks={args.ranks} must be at least 1")
    if args.ranks > 1:
        raise InvalidValueError(f"--ranks {args.ranks} is known, but arrives with expert parallelism; run without it")

    if "torch" not in sys.modules:
        # Read once, when torch is loaded. By default a waiting thread spins; on two cores that something else uses
        # too, it spins away the time of the thread that it waits for, and the demo takes ten times as long.
        default_omp_wait_policy("PASSIVE")

    from rich.console import Console

    console = Console(highlight=False)
    # Half an import cannot be continued, so an interrupt waits for it and finds a demo that can still report.
    with console.status("loading torch"), held_interrupts():
        from tutelx.cli import _demo_run
    return _demo_run.run(settings, Path(args.out), console)
