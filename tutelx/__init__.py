"""tutelx: an adaptive Mixture-of-Experts runtime for PyTorch.

`wrap` an existing model, or build with `MoE`. Nothing is imported before it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tutelx import gates, losses, monitor, ops, parallel, policies, structure
    from tutelx.layer import MoE
    from tutelx.scheduler import Scheduler
    from tutelx.structure import ResidualMoE, SharedExperts, convert_dense
    from tutelx.types import Capacity, Decision, DispatchMap, Plan, Planner, Routing, Workload
    from tutelx.wrapping import unwrap, wrap

__version__ = "0.1.0"

_HOME = {
    "MoE": "tutelx.layer",
    "Scheduler": "tutelx.scheduler",
    "ResidualMoE": "tutelx.structure",
    "SharedExperts": "tutelx.structure",
    "convert_dense": "tutelx.structure",
    "wrap": "tutelx.wrapping",
    "unwrap": "tutelx.wrapping",
    "Capacity": "tutelx.types",
    "Decision": "tutelx.types",
    "DispatchMap": "tutelx.types",
    "Plan": "tutelx.types",
    "Planner": "tutelx.types",
    "Routing": "tutelx.types",
    "Workload": "tutelx.types",
}
_MODULES = ("errors", "gates", "losses", "monitor", "ops", "parallel", "policies", "structure")

__all__ = [
    "Capacity",
    "Decision",
    "DispatchMap",
    "MoE",
    "Plan",
    "Planner",
    "ResidualMoE",
    "Routing",
    "Scheduler",
    "SharedExperts",
    "Workload",
    "convert_dense",
    "errors",
    "gates",
    "losses",
    "monitor",
    "ops",
    "parallel",
    "policies",
    "structure",
    "unwrap",
    "wrap",
]


def __getattr__(name: str):
    if name in _MODULES:
        return importlib.import_module(f"tutelx.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'tutelx' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
