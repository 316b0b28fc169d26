"""One layer call over many ranks: the order in which rows travel, and what travelled.

Symbols: W ranks, E experts, T tokens, K choices a token, r copies of a row (shard degree), R rows of the local map.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from functools import lru_cache

import torch
import torch.distributed as dist

from tutelx.comm._library import native
from tutelx.comm.failures import named_losses
from tutelx.comm.mesh import Mesh
from tutelx.comm.placement import Placement, chunk
from tutelx.comm.subgroups import subgroup
from tutelx.types import DispatchMap, Plan


class RankCall:
    """How the rows of one call travel under one plan.

    Args:
        kept: [W, E] int32 on the CPU, rows that every rank has for each expert, holes of the padded layout included.
        map: this rank's dispatch map.
        grad, train_experts: whether there is a backward, and whether it gives gradients for the experts' weights; the
            same on all ranks.
        number: of the call, the same on all ranks.

    map: the same slots in the order in which they are sent: by chunk, target, expert; [T, K*r] slots, as each row has
        r copies that go to r ranks. Its counts and offsets are still those of the local map.
    """

    def __init__(
        self,
        mesh: Mesh,
        placement: Placement,
        plan: Plan,
        kept: torch.Tensor,
        map: DispatchMap,
        model_dim: int,
        *,
        grad: bool,
        train_experts: bool,
        number: int,
    ) -> None:
        self._mesh, self._placement, self._model_dim = mesh, placement, model_dim
        self._degree = plan.shard_degree
        self.grad, self.train_experts, self._number = grad, train_experts, number
        self._groups: tuple[dist.ProcessGroup, ...] = (mesh.group,)
        self.copies = max(1, plan.shard_degree)
        self.bytes_weights = 0
        rank, experts = mesh.rank, placement.num_experts
        if plan.shard_degree == 0:
            self.exchange, self.num_local = None, experts
            self.traffic = native.Traffic(kept[rank : rank + 1], _here(experts), 0, 0, experts, 1, False)
        else:
            hierarchical = plan.all_to_all == "2dh"
            owned, table = placement.experts_of(rank), targets(placement, plan.shard_degree)
            if hierarchical:
                self._groups += node_groups(mesh)
            self.exchange = native.Exchange(*self._groups)
            self.num_local = len(owned)
            self.traffic = native.Traffic(
                kept, table, rank, owned.start, len(owned), plan.pipeline_degree, hierarchical
            )
        self.map = self._in_send_order(map, int(kept[mesh.rank].sum()))

    @property
    def bytes_tokens(self) -> int:
        """Bytes of rows and their gradients that this rank sent to others so far, backward included."""
        return 0 if self.exchange is None else self.exchange.bytes_sent

    def named_losses(self) -> AbstractContextManager[None]:
        """For what talks to the other ranks: its error names those that are lost."""
        return named_losses(self._mesh, self._number, self._groups)

    def spread(self, weights_TK: torch.Tensor) -> torch.Tensor:
        """[T, K] -> [T, K*r]: every copy of a row weighs the same, as its parts are added up."""
        return weights_TK if self.copies == 1 else weights_TK.repeat_interleave(self.copies, dim=1)

    def shards(self, hidden_dim: int):
        """Which ranks gather their slices from each other at this degree."""
        placed, mesh = self._placement, self._mesh
        if self._degree == 0:
            members, per_expert, begin = range(mesh.world), placed.slices, 0
        else:
            members = placed.gathered_by(mesh.rank, self._degree)
            per_expert = len(members)
            begin = chunk(self._model_dim, placed.slices, members[0] % placed.slices).start
        shares = [
            (w, len(placed.experts_of(w)), len(placed.part_of(w, hidden_dim)), len(placed.part_of(w, self._model_dim)))
            for w in members
        ]
        return native.WeightShards(mesh.group, shares, per_expert, begin, self._model_dim)

    def chunk_map(self, chunk: int, rows: torch.Tensor, plan: Plan) -> DispatchMap:
        """The rows of one chunk that arrived, as a map of this rank's experts."""
        counts, offsets = self.traffic.segments(chunk)
        nothing = torch.empty(0, dtype=torch.int32)
        return DispatchMap(
            dest=nothing,
            source=nothing.new_empty(rows.shape[0]),
            counts=counts,
            offsets=offsets,
            num_experts=self.num_local,
            layout=plan.layout,
            capacity=None,
        )

    def _in_send_order(self, map: DispatchMap, rows: int) -> DispatchMap:
        source, r = map.source[:rows], self.copies
        if r == 1 and self.traffic.chunks == 1:
            return replace(map, source=source)
        origin, place = (t.to(source.device) for t in self.traffic.send_order())
        tokens, choices = map.dest.shape
        if rows == 0:
            empty = source.new_full((tokens, choices * r), -1)
            return replace(map, source=source, dest=empty)
        slots = source.index_select(0, origin // r) if r > 1 else source.index_select(0, origin)
        if r > 1:
            slots = torch.where(slots < 0, slots, slots * r + origin % r)
        copies = (map.dest.unsqueeze(-1) * r + torch.arange(r, dtype=torch.int32, device=source.device)).flatten()
        places = place.index_select(0, copies.clamp_min(0))
        dest = torch.where(copies < 0, copies.new_full((), -1), places).reshape(tokens, choices * r)
        return replace(map, source=slots, dest=dest)


def node_groups(mesh: Mesh) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """The ranks of this node, and those of this place on all nodes.

    Made on first use, which all ranks have at the same time, as they run one plan, and in this order, so that none
    waits for one that waits for it.
    """
    m = mesh.check_nodes()
    node, local = divmod(mesh.rank, m)
    within = subgroup(mesh, range(node * m, (node + 1) * m), "node")
    return within, subgroup(mesh, range(local, mesh.world, m), "across")


@lru_cache(maxsize=64)
def targets(placement: Placement, degree: int) -> torch.Tensor:
    """[E, W, r] int32: the ranks that each rank sends its rows for each expert to."""
    table = [
        [list(placement.targets(expert, source, degree)) for source in range(placement.world)]
        for expert in range(placement.num_experts)
    ]
    return torch.tensor(table, dtype=torch.int32)


@lru_cache(maxsize=64)
def _here(num_experts: int) -> torch.Tensor:
    return torch.zeros((num_experts, 1, 1), dtype=torch.int32)
