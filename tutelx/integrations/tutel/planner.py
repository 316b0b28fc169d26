"""The planner of a layer whose script says itself how its rows travel."""

from __future__ import annotations

from dataclasses import replace

from tutelx.planner import RulePlanner
from tutelx.types import AllToAll, Decision, Plan, Workload


class AsWritten:
    """What the script says of degrees and of the exchange, and by rule what it does not say.

    ragged: rows that arrived only, where the experts can.
    """

    same_on_all_ranks = True  # the ranks compare `always` before every call

    def __init__(
        self,
        *,
        shard_degree: int = 1,
        pipeline_degree: int = 1,
        all_to_all: AllToAll = "linear",
        ragged: bool = False,
    ) -> None:
        self._ragged = ragged
        self.always = Plan(shard_degree=shard_degree, pipeline_degree=pipeline_degree, all_to_all=all_to_all)
        self._rule = RulePlanner()

    def plan(self, workload: Workload) -> Decision:
        decision = self._rule.plan(workload)
        plan = decision.plan
        if self._ragged and plan.layout == "padded" and "ragged" in workload.layouts:
            kernel = "grouped" if "grouped" in workload.expert_kernels else "tiled"
            plan = replace(plan, layout="ragged", expert_kernel=kernel)  # type: ignore[arg-type]
        if workload.world > 1:
            written = self.always
            chunks = written.pipeline_degree if written.shard_degree else 1  # with all weights gathered nothing travels
            plan = replace(
                plan,
                shard_degree=written.shard_degree,
                pipeline_degree=chunks,
                all_to_all=written.all_to_all,
            )
        return replace(decision, plan=plan, reason=f"{decision.reason}; degrees as the script has them")
