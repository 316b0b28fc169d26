"""The built-in experts with dropout inside, apart from that of the dense layers around them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tutelx import ops
from tutelx.draws import check_generator, draws_from
from tutelx.errors import InvalidValueError
from tutelx.experts.base import Experts, Network
from tutelx.experts.ffn import FeedForwardExperts
from tutelx.types import DispatchMap, ExpertKernel, Plan

if TYPE_CHECKING:
    from tutelx.comm.call import RankCall
    from tutelx.comm.placement import Placement


class DroppingExperts(FeedForwardExperts):
    """Feed-forward experts whose hidden values are dropped with probability p in training (Switch Transformers,
    section 2.2: 0.4 here and 0.1 elsewhere when fine-tuning). Evaluation runs the fused operator; training runs each
    product alone, as the operator has no place between them.

    generator: draws what is dropped; None takes torch's own.
    """

    expert_kernels = ("tiled",)

    def __init__(self, *sizes: int, p: float, generator: torch.Generator | None = None, **arguments) -> None:
        if isinstance(p, bool) or not isinstance(p, (int, float)) or not 0 <= p < 1:
            raise InvalidValueError(f"expert_dropout={p!r} is outside [0, 1)")
        check_generator(generator)
        super().__init__(*sizes, **arguments)
        self.p = p
        self.draws = draws_from(generator)

    def kernels_for(self, x: torch.Tensor) -> tuple[ExpertKernel, ...]:
        return self.expert_kernels

    def forward(self, rows: torch.Tensor, map: DispatchMap, plan: Plan) -> torch.Tensor:
        if not (self.training and self.p):
            return super().forward(rows, map, plan)
        weights = self.weights().to(rows.dtype)
        tiles = {"tile_rows": plan.tile_rows, "tile_columns": plan.tile_columns}
        hidden = ops.expert_linear(rows, map, weights.up, weights.up_bias, **tiles)
        if self.gated:
            gate = ops.expert_linear(rows, map, weights.gate, weights.gate_bias, **tiles)
            hidden = ops.activation(gate, hidden, kind=self.activation)
        else:
            hidden = ops.activation(hidden, kind=self.activation)
        kept = self.draws.uniform(hidden.shape, hidden) >= self.p
        hidden = hidden * kept * (1 / (1 - self.p))
        return ops.expert_linear(hidden, map, weights.down, weights.down_bias, **tiles)

    def network(self) -> Network | None:
        return None if self.training and self.p else super().network()

    def across(self, rows: torch.Tensor, call: RankCall, plan: Plan) -> torch.Tensor:
        if not (self.training and self.p):
            return super().across(rows, call, plan)
        return Experts.across(self, rows, call, plan)

    def shard_degrees(self, placement: Placement) -> tuple[int, ...]:
        return (1,)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, dropout={self.p}"
