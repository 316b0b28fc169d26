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
        if not skip_empty or len(pieces[2 * expert]):
            pieces[2 * expert] = function(expert, pieces[2 * expert])
    return torch.cat(pieces)


def split_segments(rows: torch.Tensor, map: DispatchMap) -> list[torch.Tensor]:
    """Each expert's rows and the empty ones behind them, in turns, and the tail: 2E + 1 views of rows [R, M]."""
    if torch.compiler.is_compiling():
        return list(rows.split(_traced_sizes(map)))
    begins, counts = map.offsets.tolist(), map.counts.tolist()
    sizes: list[int] = []
    for begin, end, count in zip(begins, begins[1:], counts):
        used = min(count, end - begin)
        sizes += [used, end - begin - used]
    return list(rows.split([*sizes, rows.shape[0] - begins[-1]]))


def _traced_sizes(map: DispatchMap) -> list[int]:
    """The same by tensors, so that a graph knows each size by a name of its own."""
    owned = map.offsets.diff()
    used = torch.minimum(map.counts, owned)
    sizes = torch.stack([used, owned - used], dim=1).flatten().tolist()
    sizes.append((map.num_rows - map.offsets[-1]).item())
    for size in sizes:
        torch._check(size >= 0)
    return sizes
