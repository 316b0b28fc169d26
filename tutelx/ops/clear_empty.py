"""clear_empty: zeros in the rows that no slot fills."""

from __future__ import annotations

import torch

from tutelx.errors import InvalidValueError
from tutelx.ops._checks import check_floating, check_same, check_tensor, wants_gradient
from tutelx.ops._library import kernels
from tutelx.types import DispatchMap


def clear_empty(rows: torch.Tensor, map: DispatchMap) -> torch.Tensor:
    """Writes zeros into the empty rows, in place; the others are neither read nor written.

    Args:
        rows: [R, D] float32, float64, bfloat16 or float16, contiguous. Not differentiable: no gradient may be wanted.
        map: from :func:`tutelx.ops.route`.

    Returns:
        `rows`.
    """
    check_tensor(rows, "rows", dim=2)
    check_floating(rows, "rows")
    check_same(rows.shape[0], "rows.shape[0]", map.num_rows, "the map's rows")
    if wants_gradient(rows):
        raise InvalidValueError("rows requires a gradient, which clear_empty cannot give")
    kernels.clear_empty(rows, map.source)
    return rows


@torch.library.register_fake("tutelx::clear_empty")
def _(rows, source):
    return None
