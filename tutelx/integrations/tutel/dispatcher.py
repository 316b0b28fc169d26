"""Rows of a script's routing: encode and decode over the padded layout, where expert e owns rows e*C .. e*C+C-1.

T tokens, K choices a token, E experts, C capacity, M model dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tutelx import ops
from tutelx.errors import InvalidValueError
from tutelx.gates.base import wide
from tutelx.types import DispatchMap

# What a script carries from routing to encode and decode: E, for each choice the experts, locations and weights [T],
# C, and the slots that asked for each expert [E].
Critical = tuple[int, list[torch.Tensor], list[torch.Tensor], list[torch.Tensor], int, torch.Tensor]


def map_of(
    num_experts: int, indices: Sequence[torch.Tensor], locations: Sequence[torch.Tensor], capacity: int
) -> DispatchMap:
    """The slots at their locations; one whose location is beyond the capacity, or whose expert is -1, has no row.

    Raises:
        InvalidValueError: an expert or a location out of range, two slots in one row (looked at on the CPU only).
    """
    ids_TK, location_TK = (torch.stack([part.reshape(-1) for part in parts], 1) for parts in (indices, locations))
    row_TK = ids_TK.long() * capacity + location_TK.long()
    kept = (ids_TK >= 0) & (location_TK < capacity)
    total = num_experts * capacity
    slots = torch.arange(ids_TK.numel(), dtype=torch.int32, device=ids_TK.device)
    if ids_TK.device.type == "cpu":
        _check_range("an expert", ids_TK, num_experts)
        _check_range("a location", torch.where(kept, location_TK, 0), capacity)
    # Slots without a row meet in one row behind the last.
    target = torch.where(kept, row_TK, total).reshape(-1)
    source = slots.new_full((total + 1,), -1).scatter_(0, target, slots)
    if ids_TK.device.type == "cpu" and bool(((source[target] != slots) & (target < total)).any()):
        raise InvalidValueError(f"two slots have one location of an expert among {num_experts} of {capacity} rows")
    counts = torch.bincount(ids_TK.reshape(-1).clamp_min(-1).long() + 1, minlength=num_experts + 1)[1:]
    return DispatchMap(
        dest=torch.where(kept, row_TK, -1).int(),
        source=source[:total],
        counts=counts.int(),
        offsets=torch.arange(num_experts + 1, dtype=torch.int32, device=ids_TK.device) * capacity,
        num_experts=num_experts,
        layout="padded",
        capacity=capacity,
    )


def _check_range(what: str, values: torch.Tensor, limit: int) -> None:
    if values.numel() and (int(values.max()) >= limit or int(values.min()) < (-1 if what == "an expert" else 0)):
        raise InvalidValueError(f"{what} {int(values.min())}..{int(values.max())} is outside 0..{limit - 1}")


def scored(rows: torch.Tensor, source: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
    """rows [R, M], each times the weight of the slot that fills it: weights that come before the experts."""
    flat = torch.cat([weights_TK.reshape(-1), weights_TK.new_zeros(1)])  # -1, an empty row, finds the zero
    return rows * flat[source.long()].to(rows.dtype).unsqueeze(1)


class fast_dispatcher:
    """Encode and decode of one routing, which `update` gives it.

    Args:
        capacity: rows of an expert where `update` gives none. model_dim: M. dispatch_dtype: of the rows.
    """

    def __init__(
        self, num_global_experts: int, capacity: int, model_dim: int, dispatch_dtype: torch.dtype | None = None
    ) -> None:
        self.num_global_experts, self.capacity = int(num_global_experts), int(capacity)
        self.model_dim, self.dtype = int(model_dim), dispatch_dtype
        self.is_postscore = True
        self.map: DispatchMap | None = None
        self._weights: torch.Tensor | None = None

    def update(
        self,
        indices_: Sequence[torch.Tensor],
        locations_: Sequence[torch.Tensor],
        gates_: Sequence[torch.Tensor],
        capacity: int | None = None,
        is_postscore: bool = True,
    ) -> None:
        """For each choice: experts, locations and weights, each [T].

        Raises:
            InvalidValueError: as :func:`map_of`; no capacity.
        """
        self.capacity = int(capacity or self.capacity)
        if self.capacity < 1:
            raise InvalidValueError(f"capacity={self.capacity} must be at least 1")
        self.is_postscore = is_postscore
        self.map = map_of(self.num_global_experts, indices_, locations_, self.capacity)
        self._weights = torch.stack([gate.reshape(-1) for gate in gates_], dim=1)

    def encode(self, data: torch.Tensor) -> torch.Tensor:
        """data [T, M] -> [E*C, M], times the weights unless they come after the experts. Differentiable in both."""
        map, weights = self._updated()
        rows = ops.encode(data, map)
        return rows if self.is_postscore else scored(rows, map.source, weights)

    def decode(self, data: torch.Tensor) -> torch.Tensor:
        """data [E*C, M] or [E, C, M] -> [T, M], the sum over a token's choices. Differentiable in data and weights."""
        map, weights = self._updated()
        dtype = wide(data.dtype)
        weights = weights.to(dtype) if self.is_postscore else torch.ones_like(weights, dtype=dtype)
        return ops.decode(data.reshape(-1, data.shape[-1]), map, weights)

    def _updated(self) -> tuple[DispatchMap, torch.Tensor]:
        if self.map is None or self._weights is None:
            raise InvalidValueError("update() comes before encode() and decode(): there is no routing yet")
        return self.map, self._weights


def fast_encode(data: torch.Tensor, critial_data: Critical, is_postscore: bool = True) -> torch.Tensor:
    """data [T, M] -> [E, C, M]; `is_postscore=False` multiplies with the weights here and not in decode."""
    return _dispatcher(data, critial_data, is_postscore).encode(data).view(critial_data[0], -1, data.shape[-1])


def fast_decode(data: torch.Tensor, critial_data: Critical, is_postscore: bool = True) -> torch.Tensor:
    """data [E, C, M] -> [T, M]."""
    return _dispatcher(data, critial_data, is_postscore).decode(data)


def _dispatcher(data: torch.Tensor, critical: Any, is_postscore: bool) -> fast_dispatcher:
    dispatcher = fast_dispatcher(critical[0], 0, data.shape[-1], data.dtype)
    indices, locations, gates, capacity = critical[1:5]
    dispatcher.update(indices, locations, gates, capacity, is_postscore)
    return dispatcher
