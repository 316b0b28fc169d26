"""What the demo can be asked for, checked at the door."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tutelx.errors import InvalidTypeError, InvalidValueError

DTYPES = ("float32", "float64", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Sizes, schedule and seed of one demo run; both models use the same.

    batch, seq: one step sees batch x seq bytes.
    text: a file to train on; None takes the documentation that Python carries.
    """

    steps: int = 128
    experts: int = 64
    top_k: int = 2
    dim: int = 128
    layers: int = 3
    hidden: int = 256
    batch: int = 8
    seq: int = 64
    lr: float = 2e-3
    seed: int = 0
    dtype: str = "float32"
    text: str | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "experts", "top_k", "dim", "layers", "hidden", "batch", "seq"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise InvalidTypeError(f"{name}={value!r} is {type(value).__name__}, expected int")
            if value < 1:
                raise InvalidValueError(f"{name}={value} must be at least 1")
        if self.top_k > self.experts:
            raise InvalidValueError(f"top_k={self.top_k} exceeds experts={self.experts}")
        if self.dim % 8:
            raise InvalidValueError(f"dim={self.dim} is not a multiple of 8, as the attention heads need")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise InvalidValueError(f"lr={self.lr} must be positive and finite")
        if not 0 <= self.seed < 2**63:
            raise InvalidValueError(f"seed={self.seed} is outside 0..2^63-1")
        if self.dtype not in DTYPES:
            raise InvalidValueError(f"dtype={self.dtype!r} is none of {', '.join(DTYPES)}")
