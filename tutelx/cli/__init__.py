"""The command `tutelx`. A command is a module with NAME, HELP, add_arguments(parser) and run(args) -> exit code.

What is heavy to import (torch, matplotlib) a command imports in `run`, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from tutelx import __version__
from tutelx.cli import bench, convert, db, demo, doctor, plan, tune
from tutelx.errors import TutelxError

COMMANDS = (demo, tune, db, plan, bench, convert, doctor)

FAILURE, USAGE, INTERRUPTED = 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Exit codes: 0 done, 1 a check failed, 2 wrong use, 130 interrupted."""
    args = _parser().parse_args(argv)
    args.argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return args.run(args)
    except TutelxError as error:
        sys.stderr.write(f"tutelx {args.command}: {error}\n")
        return USAGE
    except KeyboardInterrupt:
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tutelx", description="An adaptive Mixture-of-Experts runtime for PyTorch.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"tutelx {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for command in COMMANDS:
        subparser = commands.add_parser(
            command.NAME, help=command.HELP, description=command.__doc__, allow_abbrev=False
        )
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    return parser
