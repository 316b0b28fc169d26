"""Measure every plan of a layer on this machine, and keep what is fastest in the tuning database.

A second run goes on where the first one ended. Ctrl-C keeps what was measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from tutelx import env
from tutelx.cli._interrupts import held_interrupts
from tutelx.errors import InvalidValueError
from tutelx.tuner.grid import Grid, numbers, ranges
from tutelx.tuner.shapes import DTYPES, Shape, shapes_from
from tutelx.tuning.space import MARGIN

NAME = "tune"
HELP = "measure every plan of a layer on this machine, for the planner to look up"
_SIZES = ("model_dim", "hidden_dim", "num_experts")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    layer = parser.add_argument_group("which layers: by their sizes, from a file, or from a model")
    for name, text in zip(_SIZES, ("size of a token", "hidden size of an expert", "experts of all ranks")):
        layer.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help=text)
    layer.add_argument("--experts", choices=("gated", "ffn"), default="gated", help="three matrices or two")
    layer.add_argument("--bias", action="store_true", help="experts have biases")
    layer.add_argument(
        "--layers",
        type=Path,
        metavar="FILE",
        help=f"YAML or JSON: a list of layers, each with {', '.join(_SIZES)} and, if they differ from the default,"
        " experts, bias, dtype",
    )
    layer.add_argument(
        "--from-model",
        metavar="PATH",
        help="the MoE layers of a saved model: a config.json of transformers or a folder with one, or a checkpoint",
    )
    layer.add_argument("--dtype", action="append", choices=DTYPES, help="repeatable (default: float32, or the model's)")

    ranges_ = parser.add_argument_group("which calls")
    ranges_.add_argument(
        "--tokens", metavar="RANGE", default="64..4096", help="of a rank: 64..8192 by octaves, or a list"
    )
    ranges_.add_argument("--top-k", metavar="LIST", default="1,2", help="experts a token (default: 1,2)")
    ranges_.add_argument(
        "--capacity", metavar="LIST", default="1,2,4", help="rows of the fullest expert over the mean (default: 1,2,4)"
    )
    ranges_.add_argument("--inference", action="store_true", help="forward only (default: forward and backward)")

    where = parser.add_argument_group("where")
    where.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if torch finds one, else cpu")
    where.add_argument("--threads", type=int, metavar="N", help="of torch on the CPU (default: torch's own choice)")
    where.add_argument(
        "--ranks",
        type=int,
        metavar="N",
        help="processes on this machine that share the experts; or start it by torchrun",
    )

    how = parser.add_argument_group("how")
    how.add_argument("--exhaustive", action="store_true", help="every plan; nothing is left out")
    how.add_argument(
        "--margin",
        type=float,
        default=MARGIN,
        metavar="X",
        help=f"leave out plans that are predicted to take more than X times the best (default: {MARGIN})",
    )
    how.add_argument("--seconds", type=float, default=2.0, metavar="S", help="timing of one call's plans (default: 2)")
    how.add_argument("--budget", type=float, metavar="SECONDS", help="stop after so long; run again to go on")
    how.add_argument("--seed", type=int, default=0, metavar="N", help="of weights, inputs and order (default: 0)")

    out = parser.add_argument_group("results")
    out.add_argument("--db", type=Path, metavar="FOLDER", help="the database (default: the user's own)")
    out.add_argument("--plot", type=Path, metavar="FILE.png", help="draw what was found")
    out.add_argument("--json", type=Path, metavar="FILE", help="write the records there too")


def run(args: argparse.Namespace) -> int:
    grid = Grid(
        tokens=ranges(args.tokens, "tokens"),
        top_k=ranges(args.top_k, "top-k"),
        load_factors=numbers(args.capacity, "capacity"),
        training=not args.inference,
    )
    shapes = _shapes(args)
    _check(args)
    started = None if env.missing_rendezvous() else env.launched_ranks()
    if args.ranks is not None and started not in (None, args.ranks):
        raise InvalidValueError(f"--ranks {args.ranks} was given, but a launcher has started {started} ranks")
    if args.ranks is not None and args.ranks > 1 and started is None:
        from tutelx.cli import _tune_ranks

        return _tune_ranks.launch(args.ranks, args.argv)

    if "torch" not in sys.modules:
        # A waiting thread that spins takes the time of whatever else runs, and falsifies what is measured.
        env.default_omp_wait_policy("PASSIVE")
    from rich.console import Console

    console = Console(highlight=False, quiet=started is not None and not env.is_first_rank())
    if not console.is_terminal:
        console.width = 140  # a file or a pipe has no width of its own
    # Half an import cannot be continued, so an interrupt waits for it.
    with console.status("loading torch"), held_interrupts():
        from tutelx.cli import _tune_run
    return _tune_run.run(args, shapes, grid, console, ranks=started or 1)


def _shapes(args: argparse.Namespace) -> list[Shape] | None:
    """None: those of a model, which needs torch."""
    given = [name for name in _SIZES if getattr(args, name) is not None]
    flags = [f"--{name.replace('_', '-')}" for name in given]
    ways = [*flags[:1], *(["--layers"] if args.layers else []), *(["--from-model"] if args.from_model else [])]
    if len(ways) > 1:
        raise InvalidValueError(f"{ways[0]} and {ways[1]} were given, expected one of them")
    if not ways:
        raise InvalidValueError(
            "no layer was given: --model-dim, --hidden-dim and --num-experts, or --layers, or --from-model"
        )
    if args.from_model:
        return None
    if args.layers:
        found = shapes_from(_read(args.layers), str(args.layers))
        if args.dtype:
            raise InvalidValueError(
                f"--dtype {args.dtype[0]} and --layers were given: a layer of the file has its own dtype"
            )
        return found
    if missing := [f"--{name.replace('_', '-')}" for name in _SIZES if name not in given]:
        raise InvalidValueError(f"{', '.join(missing)} is missing beside {', '.join(flags)}")
    sizes: dict[str, Any] = {name: getattr(args, name) for name in _SIZES}
    dtypes = dict.fromkeys(args.dtype or ["float32"])
    return [Shape(**sizes, experts=args.experts, bias=args.bias, dtype=dtype) for dtype in dtypes]


def _read(path: Path) -> object:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise InvalidValueError(f"{str(path)!r} cannot be read: {reason}") from None
    if path.suffix == ".json":
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InvalidValueError(f"{str(path)!r} is no JSON: {error}") from None
    import yaml  # type: ignore[import-untyped]

    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InvalidValueError(f"{str(path)!r} is no YAML: {' '.join(str(error).split())}") from None


def _check(args: argparse.Namespace) -> None:
    """What can be said before torch is loaded."""
    for name in ("threads", "ranks"):
        value = getattr(args, name)
        if value is not None and not 1 <= value <= 1024:
            raise InvalidValueError(f"{name}={value} is outside 1..1024")
    for name, least in (("margin", 1.0), ("seconds", 0.0), ("budget", 0.0)):
        value = getattr(args, name)
        if value is not None and not (least <= value < float("inf") and value > 0):
            raise InvalidValueError(f"{name}={value} must be finite and {'at least 1' if least else 'positive'}")
    if args.ranks is not None and args.ranks > 1 and args.device == "cuda":
        raise InvalidValueError(f"--ranks {args.ranks} starts ranks on the CPU; on GPUs, start it by torchrun")
    for path in (args.json, args.plot):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise InvalidValueError(f"{str(path)!r} is a folder or lies in none")
    if args.db is not None and args.db.exists() and not args.db.is_dir():
        raise InvalidValueError(f"{str(args.db)!r} is no folder")
