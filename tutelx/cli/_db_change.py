"""`tutelx db merge` and `tutelx db prune`: what changes files."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from tutelx.cli import FAILURE
from tutelx.cli._db_show import opened, problems
from tutelx.errors import DatabaseError, InvalidValueError
from tutelx.tuning import files
from tutelx.tuning.here import software
from tutelx.tuning.parse import to_line
from tutelx.tuning.records import Record
from tutelx.tuning.store import standard_layers
from tutelx.tuning.union import identity, staleness, union


def merge(args: argparse.Namespace, console: Console) -> int:
    """Exit code 1 if a line or a file of a source was skipped; the rest is merged."""
    skipped: list[files.Problem] = []
    records: list[Record] = []
    for source in args.sources:
        database = opened([source])
        skipped += database.problems
        records += [stored.record for stored in database.records()]
    by_path: dict[Path, list[Record]] = {}
    for record in union(records):
        by_path.setdefault(files.path_of(args.target, record), []).append(record)
    refused = [path for path in by_path if files.read(path).refused]
    if refused:
        raise DatabaseError(f"{str(refused[0])!r} holds records of a later schema: nothing was merged")
    added = sum(_add(path, new) for path, new in sorted(by_path.items()))
    console.print(
        f"{len(union(records))} records read, {added} of them new or with more in {escape(str(args.target))}",
        soft_wrap=True,
    )
    problems(skipped, console)
    return FAILURE if skipped else 0


def _add(path: Path, new: Sequence[Record]) -> int:
    """Appends what the file does not say yet, so that nothing is lost that somebody writes meanwhile."""
    held = {identity(record): record for record in union(files.read(path).records)}
    count = 0
    for record in new:
        known = held.get(identity(record))
        if known is None or to_line(union([record, known])[0]) != to_line(known):
            files.append(path, record)
            count += 1
    return count


def prune(args: argparse.Namespace, console: Console) -> int:
    """Exit code 1 if a file was refused; it is left as it is."""
    root = _root(args.db)
    refused = False
    for path in files.files_in(root):
        with files.locked(path):
            contents = files.read(path)
            if contents.refused or any(not problem.line for problem in contents.problems):
                console.print(f"left alone: {escape(str(contents.problems[0]))}", soft_wrap=True)
                refused = True
                continue
            joined = union(contents.records)
            kept = _of_these_versions(joined, drop_all=args.stale)
            data = b"".join(map(to_line, kept))
            dropped = (
                f"{len(contents.problems)} broken lines, {len(contents.records) - len(joined)} measured again,"
                f" {len(joined) - len(kept)} of other versions"
            )
            verb = "would drop" if args.dry_run else "dropped"
            console.print(f"{escape(str(path))}: {verb} {dropped}; {len(kept)} records stay", soft_wrap=True)
            if not args.dry_run and data != path.read_bytes():
                files.replace(path, data)
    return FAILURE if refused else 0


def _of_these_versions(records: Sequence[Record], *, drop_all: bool) -> list[Record]:
    here = software()
    fresh = {(record.hardware, record.key) for record in records if not staleness(record, here)}
    return [
        record
        for record in records
        if not staleness(record, here) or not (drop_all or (record.hardware, record.key) in fresh)
    ]


def _root(folder: Path | None) -> Path:
    if folder is None:
        folder = next((layer.root for layer in standard_layers() if layer.name == "user"), None)
    if folder is None or not folder.is_dir():
        raise InvalidValueError(f"{str(folder)!r} is no folder" if folder else "this user has no cache folder")
    return folder
