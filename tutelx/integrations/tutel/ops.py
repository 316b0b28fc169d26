"""The names of Tutel's serving operators: quantised weights, kernels that come as binaries, attention and sampling.

None of them can be had here. Each is a function that says so, and what to use.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def missing(*args: object, **kwargs: object) -> NoReturn:
        raise NotImplementedError(
            f"{name} belongs to Tutel's serving kernels, which are not open: tutelx.ops has the operators of an MoE"
            " layer, torchao quantises weights, vLLM and SGLang serve models"
        )

    return missing
