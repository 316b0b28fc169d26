"""Seconds that links take.

Symbols: m ranks a node.
"""

from __future__ import annotations

from tutelx.tuning.cost.sheets import Link, Sheet
from tutelx.tuning.cost.traffic import Traffic

STEEPNESS = 1.5  # how fast flows disturb each other; fitted, see sheets.py
STRIDED = 0.5  # of the memory's rate, what copies of small pieces reach; fitted, see sheets.py


def message_seconds(link: Link, messages: float, bytes: float) -> float:
    """`messages` of one rank, one after another, with `bytes` in all."""
    if messages <= 0:
        return 0.0
    slowed = 1.0 if link.contention is None else 1 + (messages / link.contention) ** STEEPNESS
    return messages * link.latency + bytes / link.rate * slowed


def exchange_seconds(sheet: Sheet, traffic: Traffic, row_bytes: float, *, hierarchical: bool, chunks: int) -> float:
    """One chunk, one way, the links inside the node and between nodes at the same time.

    Linear: a message to each peer. Two steps (Tutel, section 3.4): near - 1 messages inside the node, then one to each
    other node, each with what all of its ranks get, and before each step a strided copy, which reads and writes all
    rows once. The busier of sending and receiving bounds.
    """
    bytes = row_bytes / chunks
    ways = [(traffic.rows_out * bytes, traffic.peers), (traffic.rows_in * bytes, traffic.sources)]
    seconds = _two_steps if hierarchical else _linear
    return max((seconds(sheet, each, n, traffic.near) for each, n in ways if n > 1), default=0.0)


def _linear(sheet: Sheet, bytes: float, peers: int, near: int) -> float:
    inside = message_seconds(sheet.intra, near - 1, bytes * (near - 1) / peers)
    outside = message_seconds(sheet.inter, peers - near, bytes * (peers - near) / peers)
    return sheet.chunk_start + max(inside, outside)


def _two_steps(sheet: Sheet, bytes: float, peers: int, near: int) -> float:
    nodes = max(1, peers // near)
    inside = message_seconds(sheet.intra, near - 1, bytes * (near - 1) / near)
    outside = message_seconds(sheet.inter, nodes - 1, bytes * (nodes - 1) / nodes)
    copies = 2 * 2 * bytes / (STRIDED * sheet.memory_rate)
    return 2 * sheet.chunk_start + inside + outside + copies


def gather_seconds(sheet: Sheet, traffic: Traffic, number_bytes: float, ranks_per_node: int) -> float:
    """Weights of `gather` neighbouring ranks, to all of them.

    Over several nodes, every weight enters a node once, through the links of all of its ranks (a ring in each rank's
    place), and is passed on inside; inside one node, each rank sends its own to all others.
    """
    size, m = traffic.gather, min(ranks_per_node, traffic.gather)
    if size <= 1:
        return 0.0
    nodes = -(-size // m)
    own = traffic.own_numbers * number_bytes
    inside = message_seconds(sheet.intra, m - 1, own * nodes * (m - 1))
    outside = message_seconds(sheet.inter, nodes - 1, own * (nodes - 1))
    return sheet.chunk_start + max(inside, outside)


def reduce_seconds(sheet: Sheet, traffic: Traffic, number_bytes: float, ranks_per_node: int) -> float:
    """Gradients of gathered weights, each rank's share sent to it by all others, in one exchange."""
    size, m = traffic.gather, min(ranks_per_node, traffic.gather)
    if size <= 1:
        return 0.0
    own = traffic.own_numbers * number_bytes
    inside = message_seconds(sheet.intra, m - 1, own * (m - 1))
    outside = message_seconds(sheet.inter, size - m, own * (size - m))
    return sheet.chunk_start + max(inside, outside)
