"""The three formats: how each is recognised, read and written. Nothing that is read can run code."""

from __future__ import annotations

import importlib.util
import zipfile
from pathlib import Path
from typing import Any, Literal

import torch
from torch.distributed.checkpoint.api import CheckpointException

from tutelx.checkpoints import distributed
from tutelx.checkpoints.state import State, checked, leaves
from tutelx.errors import InvalidTypeError, InvalidValueError, TutelxError

Format = Literal["dcp", "pt", "safetensors"]
SUFFIXES: dict[str, Format] = {".pt": "pt", ".pth": "pt", ".bin": "pt", ".safetensors": "safetensors"}


def format_of(path: Path) -> Format:
    """By the suffix; without one it is a folder of torch.distributed.checkpoint, as is any folder that exists.

    Raises:
        InvalidValueError: an unknown suffix.
    """
    if path.is_dir():
        return "dcp"
    if path.suffix in SUFFIXES:
        return SUFFIXES[path.suffix]
    if path.suffix and not path.exists():
        known = ", ".join(SUFFIXES)
        raise InvalidValueError(f"{str(path)!r} ends in none of {known}; a folder has no suffix")
    if path.is_file():
        raise InvalidValueError(f"{str(path)!r} is a file that ends in none of {', '.join(SUFFIXES)}")
    return "dcp"


def read(path: Path) -> State:
    """The state that the file or folder holds; tensors may stay on the disk until they are used.

    Raises:
        InvalidValueError: it is not there, not what its name says, or damaged.
        InvalidTypeError: it holds something that is no state.
    """
    form = format_of(path)
    if not path.exists():
        raise InvalidValueError(f"{str(path)!r} does not exist")
    try:
        if form == "dcp":
            found: Any = distributed.read(path)
        elif form == "safetensors":
            found = _safetensors().load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except TutelxError:
        raise
    except (Exception, CheckpointException) as error:  # whatever the libraries make of damaged bytes
        raise InvalidValueError(f"{str(path)!r} cannot be read as {form}: {_first_line(error)}") from error
    if not isinstance(found, dict):
        raise InvalidTypeError(f"{str(path)!r} holds a {type(found).__name__}, expected a dictionary")
    return checked(found)


def write(state: State, path: Path, form: Format) -> list[str]:
    """Writes a checked state to a path that does not exist yet.

    Returns:
        The paths of empty dictionaries that the format cannot hold.

    Raises:
        InvalidValueError: the format cannot hold the state, or the disk the file.
    """
    left_out: list[str] = []
    try:
        if form == "dcp":
            left_out = [where for where, value in leaves(state) if value == {} and isinstance(value, dict)]
            distributed.write(state, path)
        elif form == "safetensors":
            _write_safetensors(state, path)
        else:
            torch.save(state, path)
    except TutelxError:
        raise
    except OSError as error:
        raise InvalidValueError(f"{str(path)!r} cannot be written: {error.strerror or error}") from error
    except (RuntimeError, ValueError, CheckpointException) as error:
        raise InvalidValueError(f"{str(path)!r} cannot be written: {_first_line(error)}") from error
    return left_out


def _write_safetensors(state: State, path: Path) -> None:
    package = _safetensors()
    tensors = {}
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise InvalidValueError(
                f"{name!r} is a {type(value).__name__}, and a safetensors file holds tensors only: choose a part of the"
                " checkpoint, such as its model"
            )
        # Each with memory of its own: the format refuses tensors that share it.
        tensors[name] = value.clone(memory_format=torch.contiguous_format)
    package.save_file(tensors, path, metadata={"format": "pt"})


def _safetensors() -> Any:
    if importlib.util.find_spec("safetensors") is None:
        raise InvalidValueError("safetensors files need the package safetensors: pip install 'tutelx[safetensors]'")
    import safetensors.torch

    return safetensors.torch


def _first_line(error: BaseException) -> str:
    """Of what torch has to say, which may be a page."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
