"""The one tolerance table, and how an error is measured: largest difference over largest expected value.

Cases are of unit scale; what is expected to be smaller than SMALLEST is rounding noise around zero.
"""

import torch

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


SMALLEST = 1e-3


def relative_error(given: torch.Tensor, expected: torch.Tensor) -> float:
    assert given.shape == expected.shape, f"shape {tuple(given.shape)}, expected {tuple(expected.shape)}"
    if expected.numel() == 0:
        return 0.0
    difference = (given.double() - expected.double()).abs().max().item()
    assert difference == difference, "NaN in the comparison"
    return difference / max(SMALLEST, expected.double().abs().max().item())


def assert_close(given: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype | None = None, what: str = "") -> None:
    error, limit = relative_error(given, expected), TOLERANCE[dtype or given.dtype]
    assert error <= limit, f"{what}: relative error {error:.2e} exceeds {limit:.0e}"
