"""The cost model: counts what a plan moves and multiplies, and divides by the rates of a sheet.

A call is gate, encode, [gather weights,] chunks through the pipeline, decode; training adds the backward, which sends
as many rows, multiplies twice as much, gathers the weights again and sends their gradients home (Tutel, sections 3, 4).
Symbols: T tokens, K choices, E experts, M model dim, H hidden dim, W ranks, r shard degree, d chunks.
"""

from __future__ import annotations

from tutelx.tuning.cost.base import Cost
from tutelx.tuning.cost.links import exchange_seconds, gather_seconds, reduce_seconds
from tutelx.tuning.cost.pipeline import pipelined_seconds
from tutelx.tuning.cost.products import expert_seconds
from tutelx.tuning.cost.sheets import Sheet, sheet_of
from tutelx.tuning.cost.traffic import Traffic, traffic, workload_numbers
from tutelx.tuning.hardware import Hardware
from tutelx.types import Plan, Workload

_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


class RateModel:
    """Predicts from a sheet. A function of workload and plan alone, so that all ranks with one sheet predict alike."""

    def __init__(self, sheet: Sheet) -> None:
        self.sheet = sheet

    def predict(self, workload: Workload, plan: Plan) -> Cost:
        """Seconds of the slowest rank; forward, and backward where the workload trains."""
        sheet = self.sheet
        number = _BYTES.get(workload.dtype, 4)
        m = workload.ranks_per_node or sheet.ranks_per_node
        moved = traffic(workload, plan, m)
        d = plan.pipeline_degree if workload.world > 1 and plan.shard_degree > 0 else 1
        way = 0.0
        if workload.world > 1 and plan.shard_degree > 0:
            hierarchical = plan.all_to_all == "2dh"
            way = exchange_seconds(sheet, moved, workload.model_dim * number, hierarchical=hierarchical, chunks=d)
        products = expert_seconds(sheet, workload, plan, moved, number, d)
        passes = (1, 2) if workload.training else (1,)  # the backward has two products for each
        compute = sum(d * products * n for n in passes)
        exchange = len(passes) * 2 * d * way
        through = sum(pipelined_seconds(d, way, products * n, sheet.interference) for n in passes)

        gate = sum(passes) * 2 * workload.tokens * workload.model_dim * workload.num_experts
        gate_seconds = gate / sheet.rate("float32") / self._threads(workload)
        memory = self._memory_seconds(workload, moved, number)
        gather = gather_seconds(sheet, moved, number, m)
        weights = len(passes) * (gather + self._packed_seconds(workload, moved, number))
        if workload.training and moved.gather > 1:
            weights += reduce_seconds(sheet, moved, number, m)
            # What arrived is summed: read once, beside the pass that packs it.
            weights += 2 * moved.own_numbers * moved.gather * number / self._memory_rate(workload)
        return Cost(
            total=through + gate_seconds + memory + weights,
            compute=compute + gate_seconds,
            exchange=exchange,
            weights=weights,
            memory=memory,
        )

    def _memory_seconds(self, workload: Workload, moved: Traffic, number: int) -> float:
        """Encode, decode, the order by expert, the activation, the gate's scores: bytes over the memory's rate."""
        T, M = workload.tokens, workload.model_dim
        row, out, arrived = M * number, moved.rows_out, moved.rows_in
        scores = 4 * T * workload.num_experts
        hidden = workload.hidden_dim * moved.share * number
        matrices = max(1, round(workload_numbers(workload) / max(1, M * workload.hidden_dim)))
        ordered = 4 * arrived * row if workload.world > 1 and moved.gather == 1 and moved.experts > 1 else 0
        forward = scores + 2 * (T + out) * row + ordered + matrices * arrived * hidden
        bytes, starts = forward, 6
        if workload.training:
            # Decode's backward reads the rows once more, for the gradients of the weights.
            bytes += forward + out * row + scores
            starts = 15
        return bytes / self._memory_rate(workload) + starts * self.sheet.start

    def _packed_seconds(self, workload: Workload, moved: Traffic, number: int) -> float:
        """A gather packs what is sent and joins what arrived: each read and written once."""
        if moved.gather <= 1:
            return 0.0
        bytes = 2 * moved.own_numbers * number * (1 + moved.gather)
        return bytes / self._memory_rate(workload) + 2 * self.sheet.start

    def _memory_rate(self, workload: Workload) -> float:
        return self.sheet.memory_rate * self._threads(workload)

    @staticmethod
    def _threads(workload: Workload) -> int:
        return max(1, workload.threads) if workload.device == "cpu" else 1


def from_hardware(hardware: Hardware) -> RateModel:
    """The model of a machine by its fingerprint: what was measured, and the nearest sheet's rates for the rest."""
    return RateModel(sheet_of(hardware))
