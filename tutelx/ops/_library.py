"""Loads the compiled operators, on first use of `tutelx.ops`."""

from __future__ import annotations

from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

from tutelx.errors import ExtensionError


def _extension_file() -> Path:
    package = Path(__file__).parent.parent
    names = ["_C.so", *(f"_C{suffix}" for suffix in EXTENSION_SUFFIXES)]
    for name in names:
        if (package / name).exists():
            return package / name
    raise ExtensionError(f"no compiled extension in {package} (looked for {', '.join(names)}); run `make` to build it")


try:
    torch.ops.load_library(_extension_file())
except OSError as error:
    raise ExtensionError(
        f"the compiled extension does not load under torch {torch.__version__}; it was probably built with another"
        f" torch, run `make` to build it again: {error}"
    ) from error

kernels = torch.ops.tutelx


def once_differentiable(name: str) -> None:
    """Marks a backward op: differentiating it again raises instead of giving silent zeros."""

    def refuse(ctx, *grads):
        raise NotImplementedError(f"{name} cannot be differentiated again: double backward is not implemented")

    torch.library.register_autograd(name, refuse)
