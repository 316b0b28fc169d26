"""Loads the compiled exchange and pipeline, on first use of many ranks."""

from __future__ import annotations

import torch
import torch.distributed  # the process group's type must be known before the extension is loaded

import tutelx.ops  # noqa: F401  the pipeline calls the operators
from tutelx.errors import ExtensionError

__all__ = ["native"]

try:
    from tutelx import _comm as native
except ImportError as error:
    raise ExtensionError(
        f"tutelx._comm does not load under torch {torch.__version__}; run `make` to build it: {error}"
    ) from error
