"""linear: what a router does to its tokens, without the cost of a large product where they are few."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from tutelx.ops._library import calls
from tutelx.ops.few_tokens import are_few


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [T, I] @ weight.T [I, O] -> [T, O], `torch.nn.functional.linear` with a quicker way for few tokens.

    That way is for float32 and bfloat16 on CPU where no gradient is wanted. It sums in float32, in an order that does
    not depend on the other tokens.
    """
    quick = are_few(x, weight) and x.dtype == weight.dtype
    return calls.linear(x, weight) if quick else F.linear(x, weight)


@torch.library.register_fake("tutelx::linear")
def _(x, weight):
    return x.new_empty((x.shape[0], weight.shape[0]))
