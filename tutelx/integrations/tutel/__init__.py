"""Tutel's public face over this runtime: `from tutelx.integrations.tutel import moe, net, system`.

Names, arguments and state-dict keys are those of Tutel 0.4; where Tutel has something that cannot be had here, the name
is there and says what to use instead. Nothing is imported before it is used.
"""

from __future__ import annotations

import importlib

_MODULES = ("checkpoint", "jit", "launcher", "moe", "net", "ops", "system")

__all__ = ["checkpoint", "jit", "launcher", "moe", "net", "ops", "system", "system_init"]


def __getattr__(name: str):
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name == "system_init":
        return importlib.import_module(f"{__name__}.system")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
