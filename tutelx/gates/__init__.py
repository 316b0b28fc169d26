"""How tokens choose experts: one file a gate family, and their losses."""

from tutelx.gates.topk import TopK, TopKGate

__all__ = ["TopK", "TopKGate"]
