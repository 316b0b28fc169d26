"""The built-in experts of a script's layer, under the parameter names of its checkpoints.

L experts of this rank, M model dim, H hidden dim of this rank's part, O output dim, s ranks that share an expert.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from tutelx import ops
from tutelx.errors import InvalidTypeError, InvalidValueError
from tutelx.experts.base import Experts
from tutelx.integrations.tutel.activations import known_activation
from tutelx.integrations.tutel.sharing import batched, gather, run_resized
from tutelx.ops.expert_products import expert_products, groupable
from tutelx.types import DispatchMap, ExpertKernel, Plan

if TYPE_CHECKING:
    from tutelx.comm.call import RankCall
    from tutelx.comm.placement import Placement
    from tutelx.comm.ranks import Ranks

ActivationFn = Callable[[torch.Tensor], torch.Tensor]
Weights = tuple[torch.Tensor | None, ...]


class BuiltIn(Experts):
    """Runs the fused kernels where they know the activation, else batched products and the activation of the script.

    The script's activation is called with [E, C, H], as its own experts would be.
    """

    ranks: Ranks | None = None  # that share the experts

    def __init__(self, model_dim: int, hidden_dim: int, num_local: int, out_dim: int, activation_fn) -> None:
        super().__init__()
        self.model_dim, self.hidden_dim, self.num_local, self.out_dim = model_dim, hidden_dim, num_local, out_dim
        if not callable(activation_fn):
            raise InvalidTypeError(f"activation_fn is {type(activation_fn).__name__}, expected a function")
        self.activation_fn = activation_fn
        self._kind = known_activation(activation_fn) if out_dim == model_dim else None

    @property
    def fused(self) -> bool:
        return self._kind is not None

    @property
    def layouts(self):  # type: ignore[override]
        return ("ragged", "padded") if self.fused else ("padded",)

    def kernels_for(self, x: torch.Tensor) -> tuple[ExpertKernel, ...]:
        if not self.fused:
            return ("tiled",)
        grouped = groupable(self.num_local, self.model_dim, self.hidden_dim, x.dtype, x.device)
        return ("tiled", "bmm", "grouped") if grouped else ("tiled", "bmm")

    def shard_degrees(self, placement: Placement) -> tuple[int, ...]:
        return placement.degrees()

    def forward(self, rows: torch.Tensor, map: DispatchMap, plan: Plan) -> torch.Tensor:
        if self._kind is None:
            return self.product(batched(rows, map), *_cast(self.whole(), rows)).reshape(rows.shape[0], self.out_dim)
        weights = self.weights().to(rows.dtype)
        if plan.expert_kernel == "tiled" and rows.device.type == "cpu":
            return ops.expert_ffn(
                rows,
                map,
                weights,
                activation=self._kind,
                tile_rows=plan.tile_rows,
                tile_columns=plan.tile_columns,
            )
        return expert_products(rows, map, weights, kernel=plan.expert_kernel, activation=self._kind)

    def across(self, rows: torch.Tensor, call: RankCall, plan: Plan) -> torch.Tensor:
        from tutelx.comm.pipeline import run_ffn

        if self._kind is not None:
            weights = self.weights().to(rows.dtype)
            return run_ffn(call, rows, weights, hidden_dim=self.hidden_dim, activation=self._kind, plan=plan)
        gathered = _cast(self.gathered(call, plan.shard_degree), rows)
        parameters = [w for w in gathered if w is not None and w.requires_grad]

        def compute(arrived: torch.Tensor, map: DispatchMap) -> torch.Tensor:
            return self.product(batched(arrived, map), *gathered).reshape(arrived.shape[0], self.out_dim)

        return run_resized(call, rows, compute, parameters, plan, out_dim=self.out_dim)

    def weights(self) -> ops.ExpertWeights:
        """This rank's part as the fused kernels take it."""
        raise NotImplementedError

    def whole(self) -> Weights:
        """This rank's experts as :meth:`product` takes them, if nothing is sliced."""
        raise NotImplementedError

    def gathered(self, call: RankCall, degree: int) -> Weights:
        """The same, of what this rank computes at a shard degree."""
        raise NotImplementedError

    def product(self, rows_ECM: torch.Tensor, *weights: torch.Tensor | None) -> torch.Tensor:
        """[E, C, M] -> [E, C, O]."""
        raise NotImplementedError


def _cast(weights: Weights, rows: torch.Tensor) -> Weights:
    return tuple(w if w is None else w.to(rows.dtype) for w in weights)


class FusedExpertsNetwork(BuiltIn):
    """act(x @ fc1_w.T + fc1_bias) @ fc2_w + fc2_bias.

    Parameters `batched_fc1_w` [L, H, M], `batched_fc2_w` [L, H, O], `batched_fc1_bias` [L, H] and `batched_fc2_bias`
    [L, ceil(O/s)]. Drawn expert by expert, fc1 then fc2, uniform in +-1/sqrt(fan_in); the biases are zero.

    Raises:
        InvalidValueError: a hidden dim that s does not divide, two activations.
    """

    def __init__(
        self,
        model_dim: int,
        hidden_size_per_expert: int,
        num_experts_per_device: int,
        sharded_count: int,
        activation_fn: ActivationFn | None = None,
        activation_fn_with_self: Callable[[torch.Tensor, nn.Module], torch.Tensor] | None = None,
        output_dim: int | None = None,
        has_fc1_bias: bool = True,
        has_fc2_bias: bool = True,
    ) -> None:
        if hidden_size_per_expert % sharded_count:
            raise InvalidValueError(
                f"hidden_size_per_expert={hidden_size_per_expert} is no multiple of sharded_count={sharded_count}"
            )
        if activation_fn_with_self is not None and activation_fn is not None:
            raise InvalidValueError("activation_fn and activation_fn_with_self were both given, expected one")
        given = activation_fn if activation_fn_with_self is None else activation_fn_with_self
        out_dim = output_dim or model_dim
        super().__init__(model_dim, hidden_size_per_expert, num_experts_per_device, out_dim, given or F.relu)
        self._with_self = activation_fn_with_self is not None
        if self._with_self:
            self._kind = None
        self.sharded_count = sharded_count
        self.hidden_size = hidden_size_per_expert // sharded_count
        L, H, O = num_experts_per_device, self.hidden_size, -(-out_dim // sharded_count)  # noqa: E741
        self.batched_fc1_w = nn.Parameter(torch.empty(L, H, model_dim))
        self.batched_fc2_w = nn.Parameter(torch.empty(L, H, out_dim))
        self.batched_fc1_bias = nn.Parameter(torch.empty(L, H)) if has_fc1_bias else None
        self.batched_fc2_bias = nn.Parameter(torch.empty(L, O)) if has_fc2_bias else None
        self.numbers = hidden_size_per_expert * (model_dim + out_dim)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        fc1, fc2 = self.batched_fc1_w, self.batched_fc2_w
        for expert in range(self.num_local):
            for weight, fan_in in ((fc1, fc1.shape[2]), (fc2, fc2.shape[1])):
                bound = 1 / math.sqrt(fan_in)
                drawn = torch.rand(weight.shape[1:], dtype=torch.float32, device=weight.device)
                weight[expert] = (drawn * (2 * bound) - bound).to(weight.dtype)
        for bias in (self.batched_fc1_bias, self.batched_fc2_bias):
            if bias is not None:
                bias.zero_()

    def weights(self) -> ops.ExpertWeights:
        bias1, bias2 = self.batched_fc1_bias, self.batched_fc2_bias
        biases: dict[str, tuple[torch.Tensor, ...]] = {}
        if bias1 is not None:
            biases["up_bias"] = (bias1,)
        if bias2 is not None:
            own = self.out_dim
            if self.ranks is not None:  # the last ranks hold numbers that no output has
                own = len(self.ranks.placement.part_of(self.ranks.mesh.rank, self.out_dim))
            biases["down_bias"] = (bias2[:, :own],)
        return ops.ExpertWeights(up=(self.batched_fc1_w,), down=(self.batched_fc2_w.transpose(1, 2),), **biases)

    def whole(self) -> Weights:
        return self.batched_fc1_w, self.batched_fc2_w, self.batched_fc1_bias, self.batched_fc2_bias

    def gathered(self, call: RankCall, degree: int) -> Weights:
        assert self.ranks is not None
        placement, rank = self.ranks.placement, self.ranks.mesh.rank
        size = self.ranks.mesh.world if degree == 0 else len(placement.gathered_by(rank, degree))
        slices = placement.slices if degree == 0 else size
        own = self.whole()
        parts = iter(gather([w for w in own if w is not None], self.ranks, call, size))
        # A slice's experts follow those of the rank before, or its numbers do: never both.
        fc1, fc2, bias1, bias2 = (
            None
            if w is None
            else next(parts).reshape(size // slices * self.num_local, slices * w.shape[1], *w.shape[2:])
            for w in own
        )
        if bias2 is not None:  # the rest of it is added by other ranks
            begin = 0 if degree == 0 else rank % placement.slices // size * bias2.shape[1]
            bias2 = bias2[:, : max(0, self.out_dim - begin)]
            begin = min(begin, self.out_dim)
            bias2 = F.pad(bias2, (begin, self.out_dim - begin - bias2.shape[1]))
        return fc1, fc2, bias1, bias2

    def product(self, rows_ECM: torch.Tensor, *weights: torch.Tensor | None) -> torch.Tensor:
        fc1, fc2, bias1, bias2 = weights
        assert fc1 is not None
        assert fc2 is not None
        hidden = rows_ECM @ fc1.transpose(1, 2)
        if bias1 is not None:
            hidden = hidden + bias1.unsqueeze(1)
        hidden = self.activation_fn(hidden, self) if self._with_self else self.activation_fn(hidden)
        y = hidden @ fc2
        return y if bias2 is None else y + bias2.unsqueeze(1)

    def extra_repr(self) -> str:
        return (
            f"{self.num_local} experts, {self.model_dim} -> {self.hidden_size} of {self.hidden_dim} -> {self.out_dim},"
            f" has_fc1_bias={self.batched_fc1_bias is not None}, has_fc2_bias={self.batched_fc2_bias is not None}"
        )


class LlamaFFNNetwork(BuiltIn):
    """(act(x @ W_fc1) * (x @ W_fc2)) @ W_fc3.

    Parameters `W_fc1`, `W_fc2` [L, M, H] and `W_fc3` [L, H, M] as one row of numbers each, of which every one of s
    ranks holds ceil(numbers/s); normal with standard deviation 0.01.
    """

    def __init__(
        self,
        model_dim: int,
        hidden_size_per_expert: int,
        num_experts_per_device: int,
        sharded_count: int,
        activation_fn: ActivationFn = F.silu,
    ) -> None:
        super().__init__(model_dim, hidden_size_per_expert, num_experts_per_device, model_dim, activation_fn)
        if sharded_count > 1:  # parts of rows of numbers are no slices that the kernels know
            self._kind = None
        self.sharded_count = sharded_count
        L, M, H = num_experts_per_device, model_dim, hidden_size_per_expert
        self._shapes = {"W_fc1": (L, M, H), "W_fc2": (L, M, H), "W_fc3": (L, H, M)}
        for name, shape in self._shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(-(-math.prod(shape) // sharded_count))))
        self.numbers = 3 * M * H
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for name in self._shapes:
            getattr(self, name).normal_(0, 0.01)

    def weights(self) -> ops.ExpertWeights:
        gate, up, down = (w.transpose(1, 2) for w in self.whole())  # type: ignore[union-attr]
        return ops.ExpertWeights(gate=(gate,), up=(up,), down=(down,))

    def whole(self) -> Weights:
        return tuple(getattr(self, name).view(shape) for name, shape in self._shapes.items())

    def gathered(self, call: RankCall, degree: int) -> Weights:
        assert self.ranks is not None
        placement, rank = self.ranks.placement, self.ranks.mesh.rank
        s = placement.slices
        size = self.ranks.mesh.world if degree == 0 else s
        parts = gather([getattr(self, name) for name in self._shapes], self.ranks, call, size)
        experts = size // s * self.num_local
        gate, up, down = (
            # The numbers of an expert fill its s ranks up, and those of the next begin on the next rank.
            part.reshape(size // s, -1)[:, : math.prod(shape)].reshape(experts, *shape[1:])
            for part, shape in zip(parts, self._shapes.values())
        )
        if degree > 1:  # each of the places that a row is sent to has a part of the hidden dimension
            begin, end = (self.hidden_dim * (rank % s // (s // degree) + i) // degree for i in (0, 1))
            gate, up, down = gate[:, :, begin:end], up[:, :, begin:end], down[:, begin:end]
        return gate, up, down

    def product(self, rows_ECM: torch.Tensor, *weights: torch.Tensor | None) -> torch.Tensor:
        gate, up, down = (w for w in weights if w is not None)
        return (self.activation_fn(rows_ECM @ gate) * (rows_ECM @ up)) @ down

    def extra_repr(self) -> str:
        return f"{self.num_local} experts, {self.model_dim} -> {self.hidden_dim} -> {self.out_dim}, gated"
