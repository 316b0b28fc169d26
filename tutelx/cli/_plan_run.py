"""What `tutelx plan` prints."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tutelx.cli._plan_trace import Simulation, read_trace, simulate
from tutelx.errors import InvalidValueError
from tutelx.tuning.cost import Fit, RateModel, Sheet, calibrate, sheet
from tutelx.tuning.cost.published import figures
from tutelx.tuning.cost.question import Predicted, Question, Range, over_capacity, over_scale, ranked
from tutelx.tuning.store import Database

_PARTS = ("total", "compute", "exchange", "weights", "memory")


def run(args: argparse.Namespace) -> int:
    rates, fit = sheet(args.hardware), None
    if args.db is not None:
        fit = _fitted(args.db, rates)
        rates = fit.sheet
    model = RateModel(rates)
    question = Question(
        gpus=args.gpus,
        node_size=rates.ranks_per_node if args.node_size is None else args.node_size,
        experts=args.experts,
        model_dim=args.model_dim,
        hidden_dim=args.hidden_dim,
        tokens=args.tokens,
        top_k=args.top_k,
        capacity=args.capacity,
        dtype=args.dtype,
        device=rates.device,
        training=not args.inference,
        gated=args.gated,
    )
    trace = None if args.trace is None else simulate(read_trace(args.trace, question), question, model)
    plans = ranked(question, model)
    capacity, scale = over_capacity(question, model), over_scale(question, model)
    if args.json:
        _print_json(
            {
                "hardware": rates.name,
                "source": rates.source,
                "fit": None if fit is None else {n: getattr(fit, n) for n in ("timings", "before", "after")},
                "question": asdict(question),
                "plans": [{"plan": str(p.plan), **asdict(p.cost)} for p in plans],
                "best": str(plans[0].plan),
                "over_capacity": [_range(r) for r in capacity],
                "over_scale": [_range(r) for r in scale],
                "trace": None if trace is None else trace.as_json(),
            }
        )
        return 0
    console = _console()
    console.print(f"{rates.name}: {rates.source}")
    if fit is not None:
        console.print(f"fitted: {fit}")
    console.print(
        f"{question.gpus} ranks, {question.node_size} a node; T{question.tokens} a rank, D{question.model_dim}"
        f" H{question.hidden_dim} E{question.experts} K{question.top_k} f{question.capacity:g} {question.dtype},"
        f" {'forward and backward' if question.training else 'forward'}; predicted, nothing was measured"
    )
    console.print(_plans(plans[: args.top or None]))
    if args.top and len(plans) > args.top:
        console.print(f"{len(plans) - args.top} slower plans; --top 0 shows them")
    console.print(f"best: {plans[0].plan}")
    console.print("over the capacity factor f:", *_lines(capacity, "f "), sep="\n")
    console.print("over ranks, with as many experts a rank:", *_lines(scale, ""), sep="\n")
    if trace is not None:
        _show_trace(trace, console)
    return 0


def _fitted(folder: Path, base: Sheet) -> Fit:
    if not folder.is_dir():
        raise InvalidValueError(f"--db: {str(folder)!r} is no folder")
    fit = calibrate((stored.record for stored in Database.of_folders(folder).records()), base)
    if not fit.timings:
        raise InvalidValueError(f"--db: {str(folder)!r} holds no timing of a layer on {base.device!r}")
    return fit


def published(*, as_json: bool) -> int:
    found = figures(RateModel(sheet("a100-hdr")))
    if as_json:
        _print_json([asdict(figure) for figure in found])
        return 0
    table = Table(box=None, pad_edge=False)
    for name in ("figure", "published", "a100-hdr", "", "constants"):
        table.add_column(name)
    for figure in found:
        how = "" if figure.ours == "-" else "fitted to it" if figure.fitted else "held out"
        table.add_row(figure.name, figure.published, figure.ours, figure.verdict, how)
    _console().print(table)
    return 0


def _plans(plans: list[Predicted]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("plan")
    for part in _PARTS:
        table.add_column(f"{part} ms", justify="right")
    for each in plans:
        table.add_row(str(each.plan), *(f"{getattr(each.cost, part) * 1e3:.3f}" for part in _PARTS))
    return table


def _lines(ranges: list[Range], unit: str) -> list[str]:
    return [f"  {unit}{r.first:g}{'' if r.first == r.last else f' to {r.last:g}'}: {r.plan}" for r in ranges]


def _show_trace(trace: Simulation, console: Console) -> None:
    console.print(f"trace of {trace.steps} steps, needed capacity {trace.least:.3g} to {trace.most:.3g}:")
    console.print(f"  best of every step  {trace.oracle * 1e3:.3f} ms")
    over = trace.adaptive / trace.oracle
    console.print(f"  adaptive            {trace.adaptive * 1e3:.3f} ms ({over:.3f}x), {trace.switches} switches")
    for plan, seconds in list(trace.static.items())[:5]:
        console.print(f"  always {plan}  {seconds * 1e3:.3f} ms ({seconds / trace.oracle:.3f}x)")


def _range(r: Range) -> dict[str, Any]:
    return {"first": r.first, "last": r.last, "plan": str(r.plan)}


def _print_json(what: object) -> None:
    sys.stdout.write(json.dumps(what, indent=1, allow_nan=False) + "\n")


def _console() -> Console:
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 140  # a file or a pipe has no width of its own
    return console
