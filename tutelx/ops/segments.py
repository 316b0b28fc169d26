"""Runs a function on every expert's own rows, in plain torch: for experts that no kernel knows."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tutelx.types import DispatchMap


def each_segment(
    function: Callable[[int, torch.Tensor], torch.Tensor],
    rows: torch.Tensor,
    map: DispatchMap,
    *,
    skip_empty: bool = False,
) -> torch.Tensor:
    """Replaces each expert's rows [n, M] by function(expert, rows) of the same shape; rows [R, M] -> [R, M].

    Rows that no slot fills stay as they are. Waits for the device, as the sizes are needed here.

    skip_empty: the function is not called for an expert without rows.
    """
    # One split and one concatenation: indexing per expert would cost a full-size gradient each.
    pieces = split_segments(rows, map)
    for expert in range(map.num_experts):
        if len(pieces[2 * expert]) or not skip_empty:
            pieces[2 * expert] = function(expert, pieces[2 * expert])
    return torch.cat(pieces)


def split_segments(rows: torch.Tensor, map: DispatchMap) -> list[torch.Tensor]:
    """Each expert's rows and the empty ones behind them, in turns, and the tail: 2E + 1 views of rows [R, M]."""
    begins, counts = map.offsets.tolist(), map.counts.tolist()
    sizes: list[int] = []
    for begin, end, count in zip(begins, begins[1:], counts):
        used = min(count, end - begin)
        sizes += [used, end - begin - used]
    return list(rows.split([*sizes, rows.shape[0] - begins[-1]]))
