"""route: which row does each (token, choice) slot go to."""

from __future__ import annotations

import torch

from tutelx.errors import InvalidTypeError, InvalidValueError
from tutelx.ops._checks import check_int, check_tensor
from tutelx.ops._library import calls, kernels
from tutelx.types import DispatchMap, Layout


def route(
    expert_ids: torch.Tensor,
    num_experts: int,
    capacity: int | None = None,
    *,
    layout: Layout | None = None,
    order: torch.Tensor | None = None,
) -> DispatchMap:
    """Gives every slot a row of its expert, deterministically.

    Rows are handed out to all first choices in token order, then to all second choices, and so on; a slot that comes
    after `capacity` others is dropped.

    Args:
        expert_ids: [T, K] integer, -1 for an unused slot.
        num_experts: E.
        capacity: rows an expert may receive; None drops nothing.
        layout: "ragged" (an expert's rows follow those of the expert before; R = T*K, empty rows at the end) or
            "padded" (expert e owns rows e*C .. e*C+C-1). Default: padded if `capacity` is given, else ragged.
        order: [T] integer, a permutation: the order of the tokens within one choice (batch-prioritised routing).

    Raises:
        InvalidValueError: an id outside [-1, E), a capacity below 1, an `order` that is no permutation.
        InvalidTypeError: `expert_ids` is not an integer tensor.
    """
    ids_TK = check_tensor(expert_ids, "expert_ids", dim=2)
    if ids_TK.dtype not in (torch.int32, torch.int64):
        raise InvalidTypeError(f"expert_ids is {ids_TK.dtype}, expected torch.int32 or torch.int64")
    check_int(num_experts, "num_experts")
    if capacity is not None:
        check_int(capacity, "capacity")
    if layout is None:
        layout = "ragged" if capacity is None else "padded"
    if layout not in ("ragged", "padded"):
        raise InvalidValueError(f"layout={layout!r} is neither 'ragged' nor 'padded'")
    if order is not None:
        order = check_tensor(order, "order", dim=1).to(torch.int32)
    call = kernels.route if torch.compiler.is_compiling() else calls.route
    dest, source, counts, offsets = call(_to_int32(ids_TK), num_experts, capacity, layout == "padded", order)
    return DispatchMap(
        dest=dest,
        source=source,
        counts=counts,
        offsets=offsets,
        num_experts=num_experts,
        layout=layout,
        capacity=capacity,
    )


def _to_int32(ids: torch.Tensor) -> torch.Tensor:
    # 2**32 + 1 must stay an error and not become expert 1.
    return ids if ids.dtype == torch.int32 else ids.clamp(-2, 2**31 - 1).to(torch.int32)


@torch.library.register_fake("tutelx::route")
def _(expert_ids, num_experts, capacity, padded, order):
    T, K = expert_ids.shape
    if not padded:
        rows = T * K
    elif capacity is not None:
        rows = num_experts * capacity
    else:
        rows = num_experts * torch.library.get_ctx().new_dynamic_size()
    new = expert_ids.new_empty
    return new((T, K)), new((rows,)), new((num_experts,)), new((num_experts + 1,))
