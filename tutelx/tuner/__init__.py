"""The offline autotuner: every plan that a real layer can run, measured against the rules' plan and written down."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tutelx.tuner.measure import measure_key as measure_key
    from tutelx.tuner.shapes import Shape as Shape
    from tutelx.tuner.shapes import shapes_of as shapes_of

_FROM = {"measure_key": "measure", "shapes_of": "shapes", "Shape": "shapes"}

__all__ = ["Shape", "measure_key", "shapes_of"]


def __getattr__(name: str) -> Any:
    if name in _FROM:
        return getattr(importlib.import_module(f"{__name__}.{_FROM[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
