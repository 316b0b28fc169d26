"""Seconds of the experts' matrix products."""

from __future__ import annotations

from tutelx.tuning.cost.sheets import Sheet
from tutelx.tuning.cost.traffic import Traffic, workload_numbers
from tutelx.types import Plan, Workload


def expert_seconds(
    sheet: Sheet, workload: Workload, plan: Plan, traffic: Traffic, number_bytes: float, chunks: int
) -> float:
    """One chunk, forward. The greater of two bounds, and what starts cost.

    Arithmetic: 2 * P * share FLOP a row, at a rate that falls with few rows in a product: n rows take as long as
    n + half_rows at the full rate. Memory: the weights are read once a chunk. On the CPU an expert is cut into tiles
    that threads share: the work over the threads, and what the last tile leaves the others idle (Graham's bound).
    """
    experts, rows, fullest = traffic.experts, traffic.rows_in / chunks, traffic.fullest / chunks
    numbers = workload_numbers(workload) * traffic.share
    matrices = max(1, round(workload_numbers(workload) / max(1, workload.model_dim * workload.hidden_dim)))
    second = 2 * numbers / sheet.rate(workload.dtype)  # of a row
    threads = max(1, workload.threads) if workload.device == "cpu" else 1
    if workload.device == "cpu" and plan.expert_kernel == "tiled":
        tile = max(1, plan.tile_rows)
        products = max(experts, rows / tile)
        largest = min(fullest, tile) + sheet.half_rows
        largest *= min(1.0, plan.tile_columns / max(workload.hidden_dim * traffic.share, workload.model_dim))
        work = ((rows + products * sheet.half_rows) + (threads - 1) * largest / matrices) / threads
        starts = products * matrices / threads
    else:
        work = (rows + experts * sheet.half_rows) / threads
        starts = matrices * (experts if plan.expert_kernel == "tiled" else 1)
    read = experts * numbers * number_bytes / (sheet.memory_rate * threads)
    return max(second * work, read) + starts * sheet.start
