"""Say what is wrong with the installation, or what wrap would do with a model, layer by layer."""

from __future__ import annotations

import argparse

from tutelx.cli._interrupts import held_interrupts

NAME = "doctor"
HELP = "look over the installation, or over the layers of a model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        metavar="CONFIG_OR_PATH",
        help="a config.json of transformers, or a folder with one: which of its layers wrap would run, and why not the"
        " others; no weight is loaded",
    )


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 140  # a file or a pipe has no width of its own
    if args.model is None:
        from tutelx.cli import _doctor_installation

        return _doctor_installation.run(console)
    # Half an import cannot be continued, so an interrupt waits for it.
    with console.status("loading torch"), held_interrupts():
        from tutelx.cli import _doctor_model
    return _doctor_model.run(args.model, console)
