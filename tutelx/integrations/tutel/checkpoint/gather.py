"""One checkpoint of all experts from those of all ranks, bit for bit."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from tutelx.integrations.tutel.checkpoint import files
from tutelx.integrations.tutel.checkpoint.states import gather_states


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 with what is wrong on stderr."""
    parser = argparse.ArgumentParser(prog="checkpoint.gather", description=__doc__, allow_abbrev=True)
    parser.add_argument("--input_size", type=int, required=True, help="the number of ranks that saved")
    parser.add_argument("--inputs", required=True, help="their files, with {rank} and {size} in the name")
    parser.add_argument("--output", required=True, help="the file to write")
    parser.add_argument("--namespace", default="", help="where the state dict lies in a file: names with / between")
    parser.add_argument("--default_num_global_experts", type=int, default=0, help="for files that do not say it")
    return files.run(parser, _gather, argv)


def _gather(args: argparse.Namespace) -> None:
    found = [files.Bundle(files.read(path), args.namespace) for path in files.names(args.inputs, args.input_size)]
    gather_states([bundle.state for bundle in found], args.default_num_global_experts)
    files.write(found[0].whole, args.output)
    sys.stdout.write(f"the experts of {args.input_size} ranks are in {args.output}\n")


if __name__ == "__main__":
    sys.exit(main())
