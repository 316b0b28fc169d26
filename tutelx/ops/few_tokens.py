"""Whether a call is one of decoding: few tokens, on a CPU, without a gradient. There are quicker ways for those."""

from __future__ import annotations

import torch

from tutelx.ops._checks import wants_gradient

_MOST_TOKENS = 64
_DTYPES = (torch.float32, torch.bfloat16)  # of the products with few rows (csrc/cpu/few_rows.cpp)


def are_few(x: torch.Tensor, *others: torch.Tensor) -> bool:
    """x: the tokens [T, M]. others: what else a gradient could be wanted of."""
    return (
        x.dim() == 2
        and x.shape[0] <= _MOST_TOKENS
        and x.is_cpu
        and x.dtype in _DTYPES
        and not wants_gradient(x, *others)
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
    )
