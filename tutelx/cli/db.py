"""Look into the tuning database, explain an answer, and keep it in order.

Databases are folders; without --db they are what was shipped, the site's (TUTELX_TUNING_DB) and the user's, later ones
counting more.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tutelx.cli._interrupts import held_interrupts

NAME = "db"
HELP = "look into the tuning database: show, explain, merge, diff, verify, prune, plot"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", metavar="verb", required=True)

    def verb(name: str, text: str, *, several: bool = True) -> argparse.ArgumentParser:
        found = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)
        if several:
            found.add_argument(
                "--db",
                type=Path,
                action="append",
                metavar="FOLDER",
                help="repeatable; later ones count more",
            )
        return found

    def hardware(found: argparse.ArgumentParser, text: str) -> None:
        found.add_argument("--hardware", metavar="NAME", help=f"{text}, by its folder's name")

    show = verb("show", "list what was measured: each key with its default, the best plan and the gain")
    hardware(show, "only this machine")

    explain = verb("explain", "say which plan a workload gets here, which tiers were asked, and why")
    explain.add_argument(
        "workload",
        metavar="WORKLOAD",
        help="such as T=512,K=2,E=64,M=128,H=256,dtype=float32; also load= (rows of the fullest expert over the mean),"
        " experts=ffn, bias=1, training=0, threads=, world=, ranks_per_node=, device=cuda",
    )
    hardware(explain, "as if this were another machine")

    merge = verb("merge", "add the records of databases to another one; the order does not matter", several=False)
    merge.add_argument("sources", nargs="+", type=Path, metavar="SRC")
    merge.add_argument("target", type=Path, metavar="DEST")

    diff = verb("diff", "compare two databases key by key", several=False)
    diff.add_argument("a", type=Path, metavar="A")
    diff.add_argument("b", type=Path, metavar="B")
    diff.add_argument(
        "--tolerance", type=float, default=1.1, metavar="RATIO", help="times that differ by more (default: 1.1)"
    )

    verify = verb("verify", "time some keys of this machine again; exit code 1 if a best plan has lost its gain")
    verify.add_argument("--keys", type=int, default=5, metavar="N", help="how many (default: 5)")
    verify.add_argument("--seconds", type=float, default=2.0, metavar="S", help="of timing a key (default: 2)")
    verify.add_argument("--seed", type=int, default=0, metavar="N", help="of the sample (default: 0)")
    verify.add_argument(
        "--tolerance",
        type=float,
        default=1.25,
        metavar="RATIO",
        help="fails where the best plan's time over the default's has grown by more (default: 1.25)",
    )

    prune = verb("prune", "drop broken lines, what was measured again, and what other versions measured", several=False)
    prune.add_argument("--db", type=Path, metavar="FOLDER", help="default: the user's own database")
    prune.add_argument(
        "--stale", action="store_true", help="also what other versions measured of keys that these did not"
    )
    prune.add_argument("--dry-run", action="store_true", help="only say what would be dropped")

    plot = verb("plot", "draw the time of every plan over tokens")
    plot.add_argument("file", type=Path, metavar="FILE.png")
    hardware(plot, "this machine (default: the one with most keys)")


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 200  # a file or a pipe has no width of its own
    if args.verb == "show":
        from tutelx.cli import _db_show

        return _db_show.show(args, console)
    if args.verb == "diff":
        from tutelx.cli import _db_diff

        return _db_diff.diff(args, console)
    if args.verb in ("merge", "prune"):
        from tutelx.cli import _db_change

        return {"merge": _db_change.merge, "prune": _db_change.prune}[args.verb](args, console)
    if args.verb == "plot":
        from tutelx.cli import _db_plot

        return _db_plot.plot(args, console)
    # Half an import cannot be continued, so an interrupt waits for it.
    with console.status("loading torch"), held_interrupts():
        from tutelx.cli import _db_explain, _db_verify
    return (_db_explain.explain if args.verb == "explain" else _db_verify.verify)(args, console)
