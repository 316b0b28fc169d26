"""Convert a checkpoint, bit for bit: a folder of torch.distributed.checkpoint, a .pt file, a .safetensors file."""

from __future__ import annotations

import argparse
from pathlib import Path

from tutelx.cli._interrupts import held_interrupts

NAME = "convert"
HELP = "convert checkpoints between distributed folders, .pt and .safetensors files"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help="a folder of torch.distributed.checkpoint, or a file")
    parser.add_argument("target", type=Path, help="a name that ends in .pt or .safetensors, or a folder's name")
    parser.add_argument("--part", metavar="PATH", help="only the dictionary under this dotted path, such as model")
    parser.add_argument("--force", action="store_true", help="replace a checkpoint that is there already")


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    with console.status("loading torch") as status:
        # Half an import cannot be continued, so an interrupt waits for it.
        with held_interrupts():
            from tutelx.checkpoints import convert
        done = convert(args.source, args.target, part_path=args.part, force=args.force, step=status.update)
    size = f"{done.elements:,} elements, {done.bytes:,} bytes"
    console.print(f"read     {done.source} ({done.source_format}){'' if args.part is None else f', part {args.part}'}")
    console.print(f"tensors  {done.tensors} of {', '.join(done.dtypes) or 'no dtype'}: {size}")
    console.print(f"values   {done.values}")
    if done.left_out:
        console.print(f"left out {', '.join(done.left_out)}: the target cannot hold empty dictionaries")
    console.print(f"wrote    {done.target} ({done.target_format})")
    return 0
