"""What travels in one call, in rows and numbers: the same counts as the layer's, without running it.

Symbols: T tokens, K choices, E experts, M model dim, C capacity, W ranks, m ranks a node, s = W/E ranks an expert, P
parameters an expert, r shard degree.
"""

from __future__ import annotations

from dataclasses import dataclass

from tutelx.types import Plan, Workload


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Of the rank that has most to do, in one forward.

    rows_out: rows that a rank has to send, those that stay on it included, copies counted.
    rows_in: rows that its experts compute. experts: those it computes. fullest: rows of the fullest of them.
    peers: ranks that rows may go to, the rank itself among them; the same number of ranks may send to it, or all
        where some own no expert (`sources`). near: of the peers, the ones on its node.
    own_numbers: of weights that it owns. gather: ranks that gather theirs together.
    share: of each expert's hidden dim that it computes.
    """

    rows_out: float
    rows_in: float
    experts: int
    fullest: float
    peers: int
    sources: int
    near: int
    own_numbers: float
    gather: int
    share: float

    @property
    def sent_near(self) -> float:
        """Rows that leave the rank for others of its node, one step, one way."""
        return self.rows_out * (self.near - 1) / self.peers

    @property
    def sent_far(self) -> float:
        """Rows that leave the node, one step, one way."""
        return self.rows_out * (self.peers - self.near) / self.peers

    @property
    def gathered_numbers(self) -> float:
        """Weights that the rank sends to others in one gather (Tutel, section 4.1)."""
        return self.own_numbers * (self.gather - 1)


def traffic(workload: Workload, plan: Plan, ranks_per_node: int) -> Traffic:
    """Counts what `plan` moves. ranks_per_node: m; ranks of a node follow each other.

    Where the load over ranks is unknown, rows are even but for the fullest expert, which has `demand`.
    """
    W, E, r = workload.world, workload.num_experts, plan.shard_degree
    s = slices(workload)
    m = min(ranks_per_node, W)
    own = workload_numbers(workload) * E / W
    if W == 1 or r == 0:
        rows, fullest = _local_rows(workload, plan)
        return Traffic(
            rows_out=rows,
            rows_in=rows,
            experts=E,
            fullest=fullest,
            peers=1,
            sources=1,
            near=1,
            own_numbers=own,
            gather=W if r == 0 else 1,
            share=1.0,
        )
    rows, _ = _local_rows(workload, plan)
    if s > 1:
        size = s // r  # ranks that gather together; a row goes to the one of them that has its sender's place
        experts, peers, near, share = 1, E * r, max(1, m // size), r / s
        sources = peers
    else:
        size, share, sources = 1, 1.0, W
        experts = -(-E // W)
        peers = -(-E // experts)
        near = min(m, peers)
    busiest, fullest = _busiest(workload, plan, experts)
    return Traffic(
        rows_out=rows * r,
        rows_in=busiest * share,
        experts=experts,
        fullest=fullest * share,
        peers=peers,
        sources=sources,
        near=near,
        own_numbers=own,
        gather=size,
        share=1.0 / r,
    )


def slices(workload: Workload) -> int:
    """s: how many ranks share an expert."""
    W, E = workload.world, workload.num_experts
    return W // E if max(workload.shard_degrees) > 1 and W > E and W % E == 0 else 1


def workload_numbers(workload: Workload) -> float:
    """P; of two matrices where the workload does not say."""
    return workload.expert_numbers or 2 * workload.model_dim * workload.hidden_dim


def _local_rows(workload: Workload, plan: Plan) -> tuple[float, float]:
    """Rows of one rank for all experts, and for the fullest."""
    slots, E, limit = workload.tokens * workload.top_k, workload.num_experts, workload.capacity
    mean = slots / E
    demand = mean if workload.demand is None else max(mean, workload.demand)
    if plan.layout == "padded":
        each = demand if limit is None else limit
        return each * E, each
    fullest = demand if limit is None else min(demand, limit)
    return (slots if limit is None else min(slots, limit * E)), fullest


def _busiest(workload: Workload, plan: Plan, experts: int) -> tuple[float, float]:
    """Rows from all ranks for the `experts` neighbours that get most, and for the fullest expert."""
    W, E, limit = workload.world, workload.num_experts, workload.capacity
    rows, fullest = _local_rows(workload, plan)
    if plan.layout == "padded":
        return fullest * W * experts, fullest * W
    if workload.load:
        kept = workload.load if limit is None else [min(n, limit * W) for n in workload.load]
        return max(sum(kept[first : first + experts]) for first in range(0, E, experts)), max(kept)
    rest = (rows - fullest) / (E - 1) if E > 1 else 0.0
    return W * (fullest + (experts - 1) * max(0.0, rest)), W * fullest
