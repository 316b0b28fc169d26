"""How tokens choose experts: one file a gate family, and their losses."""

from tutelx.gates.base import CustomGate, Gate, GateConfig, LinearGate, build_gate
from tutelx.gates.topk import TopK, TopKGate

__all__ = ["CustomGate", "Gate", "GateConfig", "LinearGate", "TopK", "TopKGate", "build_gate"]
