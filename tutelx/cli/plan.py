"""Predict what every plan takes on a cluster that need not be there, which is best, and where that changes."""

from __future__ import annotations

import argparse
from pathlib import Path

from tutelx.errors import InvalidValueError

NAME = "plan"
HELP = "predict the time of every plan on a cluster from its rates"
_SIZES = ("gpus", "experts", "model_dim", "hidden_dim", "tokens")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpus", type=int, metavar="W", help="ranks that share the experts")
    parser.add_argument("--node-size", type=int, metavar="m", help="ranks of a node (default: the hardware's)")
    parser.add_argument(
        "--hardware",
        default="a100-hdr",
        metavar="NAME",
        help="a100-hdr (default), h100, h200, b200 or cpu-gloo",
    )
    parser.add_argument(
        "--db", type=Path, metavar="FOLDER", help="fit the hardware's rates to what `tutelx tune --db FOLDER` measured"
    )
    parser.add_argument("--experts", type=int, metavar="E", help="in all")
    parser.add_argument("--model-dim", type=int, metavar="D")
    parser.add_argument("--hidden-dim", type=int, metavar="H")
    parser.add_argument("--tokens", type=int, metavar="T", help="of a rank")
    parser.add_argument("--top-k", type=int, default=2, metavar="K", help="experts a token (default: 2)")
    parser.add_argument(
        "--capacity", type=float, default=1.0, metavar="f", help="rows of the fullest expert over the mean (default: 1)"
    )
    parser.add_argument("--dtype", default="bfloat16", help="float32, bfloat16, float16 or float64 (default: bfloat16)")
    parser.add_argument("--gated", action="store_true", help="experts of three matrices instead of two")
    parser.add_argument("--inference", action="store_true", help="without a backward")
    parser.add_argument("--top", type=int, default=12, metavar="N", help="plans to show (default: 12; 0: all)")
    parser.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="needed capacity factors, and tokens if they vary, step by step: JSON Lines such as tutelx.monitor's, or"
        " CSV; compares an adaptive run with each plan alone and with the best of every step",
    )
    parser.add_argument("--published", action="store_true", help="the model beside the figures of Tutel's paper")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    from tutelx.cli import _plan_run

    if args.published:
        return _plan_run.published(as_json=args.json)
    missing = [f"--{name.replace('_', '-')}" for name in _SIZES if getattr(args, name) is None]
    if missing:
        raise InvalidValueError(f"{', '.join(missing)} must be given (or --published)")
    if args.top < 0:
        raise InvalidValueError(f"--top={args.top} must be at least 0")
    return _plan_run.run(args)
