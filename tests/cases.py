"""The case generators, which benchmarks use too."""

from tutelx.testing.cases import DTYPES, ODD_CASES, Case, expert_ids, expert_weights, tensor

__all__ = ["DTYPES", "ODD_CASES", "Case", "expert_ids", "expert_weights", "tensor"]
