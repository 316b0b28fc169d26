"""linear: what a router does to its tokens, without the cost of a large product where they are few."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from tutelx.ops._library import calls

_MOST_TOKENS = 64
_DTYPES = (torch.float32, torch.bfloat16)


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [T, I] @ weight.T [I, O] -> [T, O], `torch.nn.functional.linear` with a quicker way for few tokens.

    That way is for float32 and bfloat16 on CPU where no gradient is wanted. It sums in float32, in an order that does
    not depend on the other tokens.
    """
    if (
        x.dim() != 2
        or x.shape[0] > _MOST_TOKENS
        or x.dtype not in _DTYPES
        or x.dtype != weight.dtype
        or x.device.type != "cpu"
        or (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        or torch.compiler.is_compiling()
        or torch.is_autocast_enabled("cpu")
    ):
        return F.linear(x, weight)
    return calls.linear(x, weight)


@torch.library.register_fake("tutelx::linear")
def _(x, weight):
    return x.new_empty((x.shape[0], weight.shape[0]))
