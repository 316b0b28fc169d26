"""Loads the compiled operators, on first use of `tutelx.ops`."""

from __future__ import annotations

import importlib
import importlib.util
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

from tutelx import env
from tutelx.errors import ExtensionError
from tutelx.machine import memory_bytes


def _extension_file() -> Path:
    package = Path(__file__).parent.parent
    names = ["_C.so", *(f"_C{suffix}" for suffix in EXTENSION_SUFFIXES)]
    for name in names:
        if (package / name).exists():
            return package / name
    raise ExtensionError(f"no compiled extension in {package} (looked for {', '.join(names)}); run `make` to build it")


# The operators, and the same as plain functions: a call through torch.ops costs as much as a small operator does, but
# it is the one that torch.compile can trace.
try:
    torch.ops.load_library(_extension_file())
    kernels = torch.ops.tutelx
    # A build without Python's headers has no such functions.
    calls = importlib.import_module("tutelx._calls") if importlib.util.find_spec("tutelx._calls") else kernels
except (OSError, ImportError) as error:
    if isinstance(error, ExtensionError):
        raise
    raise ExtensionError(
        f"the compiled extension does not load under torch {torch.__version__}; it was probably built with another"
        f" torch, run `make` to build it again: {error}"
    ) from error


def _buffer_limit() -> int | None:
    """As the user says, else a quarter of the memory, shared by the ranks of this machine."""
    if (given := env.buffer_bytes()) is not None:
        return given
    memory = memory_bytes()
    return None if memory is None else memory // 4 // (env.local_world_size() or 1)


if (limit := _buffer_limit()) is not None:
    kernels.set_buffer_limit(limit)
