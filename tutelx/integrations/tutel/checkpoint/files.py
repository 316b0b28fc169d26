"""Checkpoints as files: read, written whole or not at all, and the part of them that is the model."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, MutableMapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

from tutelx.errors import InvalidTypeError, InvalidValueError, TutelxError
from tutelx.integrations.tutel.system.files import apply_rank_size_from_pattern

USAGE = 2


def run(
    parser: argparse.ArgumentParser, command: Callable[[argparse.Namespace], None], argv: Sequence[str] | None
) -> int:
    """Exit code 0, or 2 with what is wrong on stderr."""
    args = parser.parse_args(argv)
    try:
        command(args)
    except TutelxError as error:
        sys.stderr.write(f"{parser.prog}: {error}\n")
        return USAGE
    return 0


def names(pattern: str, size: int) -> list[str]:
    """The file of each rank.

    Raises:
        InvalidValueError: `size` is less than 1, or the ranks would share a file.
    """
    if size < 1:
        raise InvalidValueError(f"size={size}, expected at least 1")
    if size > 1 and "{rank}" not in pattern:
        raise InvalidValueError(f"{pattern!r} has no {{rank}}, so that {size} ranks would share one file")
    return [apply_rank_size_from_pattern(pattern, rank, size, create_dir=False) for rank in range(size)]


def read(path: str) -> Any:
    """What the file holds, on the CPU; nothing in it is run.

    Raises:
        InvalidValueError: it is not there, damaged, or holds more than tensors and plain values.
    """
    if not Path(path).is_file():
        raise InvalidValueError(f"{path!r} is no file")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch and pickle make of it
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise InvalidValueError(f"{path!r} cannot be read: {lines[0]}") from error


def write(bundle: Any, path: str) -> None:
    """Writes beside the file's place first.

    Raises:
        InvalidValueError: the disk does not take it.
    """
    target = Path(path)
    beside = target.with_name(f".{target.name}.{uuid4().hex[:8]}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.save(bundle, beside)
        os.replace(beside, target)
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
        raise InvalidValueError(f"{path!r} cannot be written: {reason}") from error
    finally:
        beside.unlink(missing_ok=True)


class Bundle:
    """What a file holds, and the state dict in it at `namespace`, names with slashes between.

    Raises:
        InvalidValueError: there is no such name.
        InvalidTypeError: what is there is no dictionary.
    """

    def __init__(self, whole: Any, namespace: str) -> None:
        self._outer = {"": whole}
        self._holder: MutableMapping[str, Any] = self._outer
        self._name = ""
        for name in filter(None, namespace.split("/")):
            inside = self.state
            if name not in inside:
                raise InvalidValueError(f"the checkpoint has no {name!r}, only {', '.join(map(repr, inside))}")
            self._holder, self._name = inside, name
        self.state  # noqa: B018  raises

    @property
    def whole(self) -> Any:
        return self._outer[""]

    @property
    def state(self) -> MutableMapping[str, Any]:
        found = self._holder[self._name]
        if not isinstance(found, MutableMapping):
            where = "the checkpoint" if self._name == "" else repr(self._name)
            raise InvalidTypeError(f"{where} is a {type(found).__name__}, expected a dictionary")
        return found
