"""From one format to another, bit for bit."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import torch

from tutelx.checkpoints import distributed, formats
from tutelx.checkpoints.formats import Format
from tutelx.checkpoints.state import leaves, part
from tutelx.errors import InvalidValueError


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What was done.

    tensors, elements, bytes: counts. dtypes: without "torch.", sorted. values: what is no tensor.
    left_out: empty dictionaries that the target's format cannot hold, by their paths.
    """

    source: Path
    target: Path
    source_format: Format
    target_format: Format
    tensors: int
    elements: int
    bytes: int
    dtypes: tuple[str, ...]
    values: int
    left_out: tuple[str, ...] = ()


def convert(
    source: Path,
    target: Path,
    *,
    part_path: str | None = None,
    force: bool = False,
    step: Callable[[str], None] = lambda text: None,
) -> Conversion:
    """Reads the checkpoint at `source` and writes it to `target`; each format follows from its path.

    The target appears whole or not at all: it is written beside its place first. Tensors are the same bits and dtypes;
    memory that tensors share is written once for each of them.

    Args:
        part_path: dotted path of the dictionary to convert instead of all, such as "model".
        force: replace a checkpoint that is there already.
        step: told what is being done.

    Raises:
        InvalidValueError: a path that cannot be read or written, a target that exists (without `force`) or is no
            checkpoint, a state that the target's format cannot hold.
        InvalidTypeError: the source holds something that no checkpoint can hold.
    """
    form = formats.format_of(target)
    _check_target(source, target, force)
    step(f"reading {source}")
    state = formats.read(source)
    if part_path is not None:
        state = part(state, part_path)
    step(f"writing {target}")
    beside = target.with_name(f".{target.name}.{uuid4().hex[:8]}{'' if form == 'dcp' else target.suffix}")
    try:
        left_out = formats.write(state, beside, form)
        _put(beside, target)
    finally:
        _remove(beside)
    found = [value for _, value in leaves(state)]
    tensors = [value for value in found if isinstance(value, torch.Tensor)]
    return Conversion(
        source=source,
        target=target,
        source_format=formats.format_of(source),
        target_format=form,
        tensors=len(tensors),
        elements=sum(tensor.numel() for tensor in tensors),
        bytes=sum(tensor.nbytes for tensor in tensors),
        dtypes=tuple(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})),
        values=len(found) - len(tensors) - len(left_out),
        left_out=tuple(left_out),
    )


def _check_target(source: Path, target: Path, force: bool) -> None:
    if not target.absolute().parent.is_dir():
        raise InvalidValueError(f"{str(target)!r} lies in no folder that exists")
    if source.resolve() == target.resolve():
        raise InvalidValueError(f"source and target are the same: {str(target)!r}")
    if not target.exists():
        return
    if not force:
        raise InvalidValueError(f"{str(target)!r} exists already; --force replaces it")
    if target.is_dir() and any(target.iterdir()) and not distributed.is_checkpoint(target):
        raise InvalidValueError(f"{str(target)!r} is a folder that holds no checkpoint: it will not be replaced")


def _put(beside: Path, target: Path) -> None:
    old = beside.with_name(f"{beside.name}.old")
    try:
        if target.is_dir():
            target.rename(old)  # a folder that holds something cannot be replaced in one step
        os.replace(beside, target)
    except OSError as error:
        if old.exists() and not target.exists():
            old.rename(target)
        raise InvalidValueError(f"{str(target)!r} cannot be written: {error.strerror}") from error
    finally:
        if target.exists():
            _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
