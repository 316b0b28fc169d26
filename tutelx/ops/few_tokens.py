"""Whether a call is one of decoding: few tokens, on a CPU, without a gradient. There are quicker ways for those."""

from __future__ import annotations

import torch

from tutelx.ops._library import calls

_are_few = getattr(calls, "are_few", None)  # a build without Python's headers has no quicker ways


def are_few(x: torch.Tensor, *others: torch.Tensor) -> bool:
    """x: the tokens [T, M], float32, bfloat16 or float16. others: what else a gradient could be wanted of."""
    return not torch.compiler.is_compiling() and _are_few is not None and _are_few(x, others)
