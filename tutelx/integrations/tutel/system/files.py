"""Files: one for each rank by a pattern, and arrays of numpy as tensors."""

from __future__ import annotations

import logging
import os
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import torch

from tutelx.errors import InvalidTypeError, InvalidValueError

log = logging.getLogger("tutelx")

Name = str | os.PathLike[str]

_CHUNK = 1 << 16


def apply_rank_size_from_pattern(filename: str, rank: int, size: int, create_dir: bool = True) -> str:
    """The file of one rank: `{rank}` and `{size}` in the name are replaced.

    create_dir: make the folder that it lies in. A pattern without `{rank}` is one file for all ranks: a warning.
    """
    if size != 1 and "{rank}" not in filename:
        log.warning("%r has no {rank}: all %s ranks share this file", filename, size)
    filename = filename.replace("{size}", str(size)).replace("{rank}", str(rank))
    folder = os.path.dirname(filename)
    if create_dir and folder:
        os.makedirs(folder, exist_ok=True)
    return filename


def save(t: torch.Tensor, path: Name) -> None:
    """Writes a tensor as numpy does, which adds `.npy` to a name without it.

    Raises:
        InvalidTypeError: `t` is no tensor, or of a dtype that numpy does not have.
    """
    if not isinstance(t, torch.Tensor):
        raise InvalidTypeError(f"t is {type(t).__name__}, expected torch.Tensor")
    try:
        array = t.detach().cpu().numpy()
    except TypeError as error:
        raise InvalidTypeError(f"numpy has no {str(t.dtype).removeprefix('torch.')}: give t.float()") from error
    np.save(path, array)


def load(path: Name, device: torch.device | str | None = None) -> torch.Tensor:
    """Reads what :func:`save` wrote, under the name that was given to it or the one that numpy made of that.

    Raises:
        InvalidValueError: the file is not there, or no array of numbers.
    """
    found = Path(path)
    if not found.exists() and found.with_name(f"{found.name}.npy").exists():
        found = found.with_name(f"{found.name}.npy")
    try:
        return torch.tensor(np.load(found), device=device)
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise InvalidValueError(f"{str(found)!r} cannot be read as an array of numbers: {error}") from error


def from_url(link: str | None, path: Name | None = None) -> torch.Tensor:
    """The array of numpy at `path`, fetched from `link` first unless it is there; without `path` it is not kept.

    Raises:
        InvalidValueError: neither is given, the link cannot be read, or what it holds is no array of numbers.
    """
    if path is not None and Path(path).exists():
        log.info("%s is there already", path)
        return load(path)
    if link is None:
        raise InvalidValueError(f"path={path!r} is not there, and link=None: there is nothing to load")
    target = None if path is None else Path(path)
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(suffix=".download", dir=None if target is None else target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            _fetch(link, file)
        tensor = load(name)
        if target is not None:
            os.replace(name, target)
        return tensor
    finally:
        Path(name).unlink(missing_ok=True)


def _fetch(link: str, file) -> None:
    from rich.progress import wrap_file

    try:
        with urllib.request.urlopen(link) as response:
            total = int(response.headers.get("content-length") or 0)
            with wrap_file(response, total=total, description=link, transient=True) as body:
                while chunk := body.read(_CHUNK):
                    file.write(chunk)
    except (urllib.error.URLError, ValueError, OSError) as error:
        raise InvalidValueError(f"{link!r} cannot be read: {error}") from error
