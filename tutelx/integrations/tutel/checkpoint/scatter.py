"""A checkpoint for each rank from one of all experts, bit for bit."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from tutelx.integrations.tutel.checkpoint import files
from tutelx.integrations.tutel.checkpoint.states import scatter_state


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 with what is wrong on stderr."""
    parser = argparse.ArgumentParser(prog="checkpoint.scatter", description=__doc__, allow_abbrev=True)
    parser.add_argument("--output_size", type=int, required=True, help="the number of ranks that will load")
    parser.add_argument("--input", required=True, help="the file of all experts")
    parser.add_argument("--outputs", required=True, help="the files to write, with {rank} and {size} in the name")
    parser.add_argument("--namespace", default="", help="where the state dict lies in the file: names with / between")
    return files.run(parser, _scatter, argv)


def _scatter(args: argparse.Namespace) -> None:
    names = files.names(args.outputs, args.output_size)
    bundle = files.Bundle(files.read(args.input), args.namespace)
    for name, own in zip(names, scatter_state(bundle.state, args.output_size)):
        bundle.state.update(own)
        files.write(bundle.whole, name)
        sys.stdout.write(f"{name}\n")


if __name__ == "__main__":
    sys.exit(main())
