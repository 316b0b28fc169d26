"""The MoE layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from tutelx.base import MoEBase
from tutelx.errors import InvalidTypeError, InvalidValueError
from tutelx.experts import Experts, build_experts
from tutelx.gates import GateConfig, TopK, build_gate
from tutelx.ops.activation import Activation
from tutelx.policies import Call, CapacityPolicy, TopKPolicy, split
from tutelx.types import Capacity, Plan, Planner

if TYPE_CHECKING:
    import torch.distributed as dist

    from tutelx.comm.mesh import MeshLike


class MoE(MoEBase):
    """A Mixture-of-Experts layer: y = sum over a token's K experts of weight * expert(x).

    Args:
        model_dim: M, the size of a token.
        hidden_dim: H, the experts' hidden size (unused by custom experts).
        num_experts: E.
        gate: how tokens choose experts: a configuration of `tutelx.gates`, or a module that maps tokens [T, M] to
            logits [T, E] or to a Routing.
        top_k: experts a token: an int, a policy of `tutelx.policies`, or a function of its `Call`; default: the gate's.
        capacity: how many rows an expert may receive, or a policy of `tutelx.policies`; dropless by default.
        eval_capacity: the same in evaluation mode; None: as in training.
        batch_prioritized: where a capacity drops tokens, those with the greatest gate value keep their rows, not the
            first of the batch (V-MoE, section 4: all first choices, then all second ones, each by that order).
        experts: "gated" (SwiGLU: down(silu(gate(x)) * up(x))), "ffn" (down(gelu(up(x)))), an `nn.ModuleList` of E
            modules, each called with its rows [n, M], or a module called with padded rows [E, C, M].
        activation: of the built-in experts: silu, gelu, gelu_tanh or relu; default silu if gated, else gelu.
        bias: of the built-in experts.
        expert_dropout: of the built-in experts' hidden values in training, apart from any dropout around the layer.
        generator: draws that dropout; None takes torch's own. A gate that draws has a generator in its configuration.
        planner: chooses the plan of each call; default: `tutelx.scheduler.default_planner`.
        mesh: the ranks that share the experts: a DeviceMesh of one dimension, or of two (nodes, ranks of a node), or a
            process group. Each holds its share of the weights (`tutelx.comm.placement`), all must make every call, with
            as many tokens as each likes, none included. The gradients of the experts are those of the sum of the
            losses of all ranks. A list of modules may hold all E or this rank's own; one module for padded rows runs
            this rank's own.
        ranks_per_node: for plans with all_to_all="2dh"; default: the mesh's second dimension, else LOCAL_WORLD_SIZE.
        tp_group: ranks of the mesh that are given the same tokens: each sends its share, the group gathers y.

    Raises:
        InvalidValueError, InvalidTypeError: sizes below 1, k > num_experts, wrong number of expert modules.
    """

    def __init__(
        self,
        model_dim: int,
        hidden_dim: int,
        num_experts: int,
        *,
        gate: GateConfig | nn.Module | None = None,
        top_k: int | TopKPolicy | Callable[[Call], int] | None = None,
        capacity: Capacity | CapacityPolicy | None = None,
        eval_capacity: Capacity | None = None,
        batch_prioritized: bool = False,
        experts: Literal["gated", "ffn"] | nn.Module = "gated",
        activation: Activation | None = None,
        bias: bool = False,
        expert_dropout: float = 0.0,
        generator: torch.Generator | None = None,
        planner: Planner | None = None,
        mesh: MeshLike | None = None,
        ranks_per_node: int | None = None,
        tp_group: dist.ProcessGroup | None = None,
        device=None,
        dtype=None,
    ) -> None:
        for name, value in (("model_dim", model_dim), ("hidden_dim", hidden_dim), ("num_experts", num_experts)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise InvalidTypeError(f"{name}={value!r} is {type(value).__name__}, expected int")
            if value < 1:
                raise InvalidValueError(f"{name}={value} must be at least 1")
        top_k, setting, policies = split(top_k, capacity)
        super().__init__(
            model_dim=model_dim,
            num_experts=num_experts,
            capacity=setting,
            planner=planner,
            eval_capacity=eval_capacity,
            batch_prioritized=batch_prioritized,
            top_k=top_k,
            policies=policies,
        )
        if mesh is not None or ranks_per_node is not None or tp_group is not None:
            from tutelx.comm import join  # torch.distributed is for those who need it

            cut = hidden_dim if isinstance(experts, str) and not expert_dropout else None
            self.ranks, self.tensor_parallel = join(
                mesh, num_experts=num_experts, hidden_dim=cut, ranks_per_node=ranks_per_node, tp_group=tp_group
            )
        self.gate = build_gate(TopK() if gate is None else gate, model_dim, num_experts, device=device, dtype=dtype)
        self.experts: Experts = build_experts(
            experts,
            model_dim=model_dim,
            hidden_dim=hidden_dim,
            num_experts=num_experts,
            activation=activation,
            bias=bias,
            dropout=expert_dropout,
            generator=generator,
            ranks=self.ranks,
            device=device,
            dtype=dtype,
        )

    def forward(
        self,
        x: torch.Tensor,
        *,
        top_k: int | None = None,
        capacity: Capacity | None = None,
        plan: Plan | None = None,
    ) -> torch.Tensor:
        """x [..., M] -> [..., M] in x's dtype; top_k, capacity and plan hold for this call only.

        Raises:
            InvalidValueError: a wrong last dimension, top_k outside [1, E], a plan that the experts cannot run.
            InvalidTypeError: x is no tensor or has another dtype than the weights.
            ValueError: a NaN reached the gate.
            RankMismatchError, RankFailedError: over many ranks, on each of them: they call on different terms, or one
                does not call, fails or dies.
        """
        if capacity is None and plan is None and (y := self._again(x, top_k)) is not None:
            return y
        return self._run(x, self.gate, self.experts, top_k=top_k, capacity=capacity, plan=plan)
