"""How long chunks take on their way there, through the experts and back."""

from __future__ import annotations


def pipelined_seconds(chunks: int, exchange: float, compute: float, interference: float) -> float:
    """`chunks` chunks, each `exchange` there, `compute`, `exchange` back.

    In the order in which the pipeline issues them: at tick t chunk t leaves, chunk t-2 returns, chunk t-1 is computed;
    the link carries one chunk at a time and the first way there and the last way back are bare. What is hidden slows
    both sides, so a share `interference` of it is lost again. One chunk is the serial sum.
    """
    link = computed = 0.0
    arrived = []
    for tick in range(chunks + 2):
        issued = computed
        if tick < chunks:
            link = max(link, issued) + exchange
            arrived.append(link)
        if tick >= 2:
            link = max(link, issued) + exchange
        if 1 <= tick <= chunks:
            computed = max(computed, arrived[tick - 1]) + compute
    serial = chunks * (2 * exchange + compute)
    return link + interference * (serial - link)
