"""The planner that needs no measurements: a few stated rules over the workload."""

from __future__ import annotations

from dataclasses import replace

from tutelx.types import Decision, ExpertKernel, Layout, Plan, Workload

SMALLEST_ROWS, LARGEST_ROWS = 64, 1024  # a tile below is mostly overhead, one above no longer fits the cache
NARROW, WIDE = 256, 1024
MOST_PADDING = 2  # padded rows a slot


class FixedPlanner:
    """Always the same plan."""

    same_on_all_ranks = True  # the ranks compare `always` before every call

    def __init__(self, plan: Plan) -> None:
        self.always = plan

    def plan(self, workload: Workload) -> Decision:
        return Decision(plan=self.always, source="fixed", reason="the planner was given this plan", workload=workload)


class RulePlanner:
    """Chooses by rule alone, so that equal inputs run equally.

    Ragged rows, as cost then follows the rows that arrived. The tile is as large as it can be while every thread
    still finds work: an expert that has more than half a thread's share of the rows is cut into several tiles.

    On an accelerator, what does not wait for it: grouped products over the rows that arrived; without them a batched
    one, where a capacity bounds what it pads to at most twice the rows; else expert after expert.

    Over many ranks, the shard degree with the fewest bytes to send; not cut into chunks, as what that hides is known
    only by measurement.
    """

    same_on_all_ranks = steady = True

    def plan(self, workload: Workload) -> Decision:
        decision = _on_cpu(workload) if workload.device == "cpu" else _on_accelerator(workload)
        return _over_ranks(decision) if workload.world > 1 else decision


def _on_accelerator(workload: Workload) -> Decision:
    kernels, layouts = workload.expert_kernels, workload.layouts
    layout: Layout = "ragged" if "ragged" in layouts else layouts[0]
    kernel: ExpertKernel = "tiled"
    reason = "no product of all experts at once can run these"
    if "grouped" in kernels:
        kernel, reason = "grouped", "grouped products follow the rows and do not wait for the device"
    elif "bmm" in kernels and "padded" in layouts and workload.capacity is not None:
        padded, rows = workload.capacity * workload.num_experts, workload.tokens * workload.top_k
        if padded <= MOST_PADDING * rows:
            layout, kernel = "padded", "bmm"
            reason = f"no grouped products here; {padded} padded rows for {rows} slots do not wait for the device"
        else:
            reason = f"no grouped products here, and {padded} padded rows for {rows} slots are too many"
    plan = Plan(layout=layout, expert_kernel=kernel)
    return Decision(plan=plan, source="rule", reason=reason, workload=workload)


def _on_cpu(workload: Workload) -> Decision:
    layout: Layout = "ragged" if "ragged" in workload.layouts else workload.layouts[0]
    if workload.demand is None:
        return Decision(plan=Plan(layout=layout), source="default", reason="load unknown", workload=workload)
    fullest = workload.demand if workload.capacity is None else min(workload.demand, workload.capacity)
    rows = workload.tokens * workload.top_k
    if fullest <= rows / workload.threads / 2:
        reason = f"balanced: the fullest expert has {fullest} of {rows} rows, one tile each"
    else:
        reason = f"skewed: the fullest expert has {fullest} of {rows} rows, cut so that threads share it"
    tile_rows, tile_columns = tiles(workload)
    plan = Plan(layout=layout, tile_rows=tile_rows, tile_columns=tile_columns)
    return Decision(plan=plan, source="rule", reason=reason, workload=workload)


def tiles(workload: Workload) -> tuple[int, int]:
    """Rows and columns of a tile, of a plan for this load: quick, for whoever asks on every call."""
    demand, capacity, threads = workload.demand, workload.capacity, workload.threads
    if demand is None or workload.device != "cpu":
        return Plan.tile_rows, Plan.tile_columns
    fullest = demand if capacity is None or demand < capacity else capacity
    rows = workload.tokens * workload.top_k
    share = rows / threads
    tile_rows = _power_of_two_from(fullest if fullest <= share / 2 else int(share / 4))
    tile_rows = SMALLEST_ROWS if tile_rows < SMALLEST_ROWS else min(tile_rows, LARGEST_ROWS)
    return tile_rows, NARROW if rows < 2 * threads * tile_rows else WIDE


def _over_ranks(decision: Decision) -> Decision:
    workload = decision.workload
    sent = {degree: numbers_sent(workload, degree) for degree in workload.shard_degrees}
    degree = least_sent(workload)
    compared = ", ".join(f"{sent[r]:.2e} at degree {r}" for r in sent)
    plan = replace(decision.plan, shard_degree=degree)
    return replace(decision, plan=plan, reason=f"{decision.reason}; numbers to send: {compared}")


def least_sent(workload: Workload) -> int:
    """The shard degree with the fewest numbers to send."""
    return min(workload.shard_degrees, key=lambda r: (numbers_sent(workload, r), abs(r - 1)))


def numbers_sent(workload: Workload, degree: int) -> float:
    """Numbers that a rank sends to others in one call, if experts are chosen evenly (Tutel, section 4.1)."""
    W, E, P = workload.world, workload.num_experts, workload.expert_numbers
    share, slices = P * E / W, max(workload.shard_degrees)
    gathered = share * ((W if degree == 0 else slices // degree) - 1)
    rows = 2 * workload.tokens * workload.top_k * workload.model_dim * degree * (W - 1) / W  # there and back
    # Training sends rows' gradients too, gathers the weights again and sends their gradients home.
    return 2 * rows + 3 * gathered if workload.training else rows + gathered


def _power_of_two_from(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
