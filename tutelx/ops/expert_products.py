"""expert_ffn in torch's own products: grouped over ragged rows, batched over padded ones, or expert by expert."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from tutelx.errors import InvalidValueError
from tutelx.ops._library import kernels
from tutelx.ops.activation import Activation
from tutelx.ops.activation import activation as activate
from tutelx.ops.packing import stacked
from tutelx.ops.segments import split_segments
from tutelx.types import DispatchMap, ExpertKernel

if TYPE_CHECKING:
    from tutelx.ops.expert_ffn import ExpertWeights

Tensors = tuple[torch.Tensor, ...]
Optional = torch.Tensor | None

_RANKS = (2, 2, 2, 1, 1, 1)  # of one expert's gate, up, down and their biases
_VECTOR_BYTES = 16  # grouped products want strides of whole vectors
_MOST_GROUPS = 1023
_CONTIGUOUS = torch.contiguous_format
# Where grouped products exist and, on CUDA, do not wait for the device: other dtypes there loop over experts.
_GROUPED_DTYPES = {"cpu": (torch.float32, torch.bfloat16, torch.float16), "cuda": (torch.bfloat16,)}
_GROUPED_CUDA_MAJORS = (9, 10)


def expert_products(
    rows: torch.Tensor,
    map: DispatchMap,
    weights: ExpertWeights,
    *,
    kernel: ExpertKernel,
    activation: Activation = "silu",
    zero_unused: bool = True,
) -> torch.Tensor:
    """What `expert_ffn` computes, by the products named.

    "grouped" is one product over all experts' rows, in any layout, and "bmm" one over the padded layout: neither waits
    for the device. "tiled" runs expert after expert and asks the device for their sizes. The first two want stacked
    weights: a list of matrices is taken as it lies if it is packed (`tutelx.ops.packing`); else it is stacked on every
    call, which reads and writes all of them once and keeps the copy until the backward. Every gradient is then a view
    into one tensor, without another copy. Stacked weights whose rows
    do not begin at multiples of 16 bytes are copied too.

    Args:
        rows: [R, M], as :func:`tutelx.ops.encode` gives them: zeros where no slot fills a row.
        zero_unused: as for `expert_ffn`; only "tiled" can leave gradients out.

    Returns:
        [R, M], zeros where no slot fills a row. Differentiable once in `rows` and all weights; empty rows get and give
        no gradient. The same bits in every run.
    """
    if kernel == "tiled":
        return _one_by_one(rows, map, weights, activation, skip_empty=not zero_unused)
    if kernel == "bmm" and map.layout != "padded":
        raise InvalidValueError(f"kernel='bmm' needs layout='padded', not {map.layout!r}")
    if kernel == "grouped" and not _groupable(weights, rows):
        raise InvalidValueError(
            f"kernel='grouped' cannot run {rows.dtype} on {rows.device} with up of shape {tuple(weights.up[0].shape)}"
        )
    stacked = (_stacked(ws, rank) for ws, rank in zip(weights.lists(), _RANKS))
    # Without a row there is nothing to group, and a grouped product need not accept it.
    grouped = kernel == "grouped" and map.num_rows > 0
    return _Network.apply(rows, map.source, map.offsets, map.layout == "padded", grouped, activation, *stacked)


def by_torch(
    rows: torch.Tensor, map: DispatchMap, weights: ExpertWeights, activation: Activation, *, zero_unused: bool
) -> torch.Tensor:
    """By grouped products where they can run, else expert by expert."""
    listed = weights.up[0].dim() == 2
    trained = torch.is_grad_enabled() and any(w.requires_grad for ws in weights.lists() for w in ws)
    grouped = (zero_unused or not listed or not trained) and _groupable(weights, rows)
    kernel: ExpertKernel = "grouped" if grouped else "tiled"
    return expert_products(rows, map, weights, kernel=kernel, activation=activation, zero_unused=zero_unused)


def groupable(num_experts: int, model_dim: int, hidden_dim: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether grouped products can run experts of these sizes."""
    if not hasattr(F, "grouped_mm") or dtype not in _GROUPED_DTYPES.get(device.type, ()):
        return False
    if device.type == "cuda" and _cuda_major(device.index) not in _GROUPED_CUDA_MAJORS:
        return False
    vector = _VECTOR_BYTES // dtype.itemsize
    return num_experts <= _MOST_GROUPS and model_dim % vector == 0 and hidden_dim % vector == 0


@lru_cache
def _cuda_major(index: int | None) -> int:
    return torch.cuda.get_device_capability(index)[0]


def _groupable(weights: ExpertWeights, rows: torch.Tensor) -> bool:
    up = weights.up[0]
    num_experts = len(weights.up) if up.dim() == 2 else up.shape[0]
    return groupable(num_experts, up.shape[-1], up.shape[-2], rows.dtype, rows.device)


def _stacked(weights: Tensors, rank: int) -> Optional:
    if not weights:
        return None
    if weights[0].dim() == rank:
        return stacked(weights)
    return weights[0] if rank == 1 or _whole_vectors(weights[0]) else weights[0].clone(memory_format=_CONTIGUOUS)


def _whole_vectors(weight: torch.Tensor) -> bool:
    """[E, out, in] with rows or columns one after the other, each beginning at a whole vector."""
    vector = _VECTOR_BYTES // weight.dtype.itemsize
    expert, *inner = weight.stride()
    if 1 not in inner:
        return False
    by_rows = inner[1] == 1
    other, length = (inner[0], weight.shape[2]) if by_rows else (inner[1], weight.shape[1])
    return other >= length and all(n % vector == 0 for n in (expert, other, weight.storage_offset()))


# ---- Products of all experts at once: x [R, in], weights [E, out, in], bias [E, out] ---------------------------------


@dataclass(frozen=True, kw_only=True)
class _Grouped:
    """ends: [E] int32, behind each expert's last row. Rows behind the last end are not computed."""

    ends: torch.Tensor

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: Optional) -> torch.Tensor:
        out = F.grouped_mm(x, weight.transpose(1, 2), offs=self.ends)
        if bias is None:
            return out
        # A product with ones spreads the bias over each expert's rows, and sums over them in the backward: in float32,
        # in a fixed order, and without a list of every row's expert.
        matrix = bias.new_zeros((bias.shape[0], self._vector(bias), bias.shape[1]))
        matrix[:, 0] = bias
        return out.add_(F.grouped_mm(self._ones(x), matrix, offs=self.ends))

    def back(self, grad: torch.Tensor, weight: torch.Tensor, onto: Optional = None) -> torch.Tensor:
        product = F.grouped_mm(grad, weight, offs=self.ends)
        return product if onto is None else onto.add_(product)

    def outer(self, grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return F.grouped_mm(grad.t(), x, offs=self.ends)

    def sums(self, grad: torch.Tensor) -> torch.Tensor:
        return F.grouped_mm(self._ones(grad).t(), grad, offs=self.ends)[:, 0]

    @staticmethod
    def _vector(like: torch.Tensor) -> int:
        return _VECTOR_BYTES // like.dtype.itemsize

    def _ones(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.new_ones((rows.shape[0], self._vector(rows)))


@dataclass(frozen=True, kw_only=True)
class _Batched:
    num_experts: int

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: Optional) -> torch.Tensor:
        x_ECi, weight = self._split(x), weight.transpose(1, 2)
        out = torch.bmm(x_ECi, weight) if bias is None else torch.baddbmm(bias.unsqueeze(1), x_ECi, weight)
        return out.reshape(-1, out.shape[2])

    def back(self, grad: torch.Tensor, weight: torch.Tensor, onto: Optional = None) -> torch.Tensor:
        grad_ECo = self._split(grad)
        out = torch.bmm(grad_ECo, weight) if onto is None else self._split(onto).baddbmm_(grad_ECo, weight)
        return out.reshape(-1, out.shape[2])

    def outer(self, grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.bmm(self._split(grad).transpose(1, 2), self._split(x))

    def sums(self, grad: torch.Tensor) -> torch.Tensor:
        return self._split(grad).sum(dim=1)

    def _split(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.reshape(self.num_experts, rows.shape[0] // self.num_experts, rows.shape[1])


# ---- The network -----------------------------------------------------------------------------------------------------


class _Network(torch.autograd.Function):
    """down(act(gate(x)) * up(x)) or down(act(up(x))) over all rows, and its gradients."""

    @staticmethod
    def forward(ctx, rows, source, offsets, padded, grouped, kind, gate, up, down, gate_bias, up_bias, down_bias):
        ctx.padded, ctx.kind = padded, kind
        ctx.products = _Grouped(ends=offsets[1:]) if grouped else _Batched(num_experts=up.shape[0])
        with torch.autocast(rows.device.type, enabled=False):
            rows = _from_a_whole_vector(rows.contiguous())
            gate_pre = None if gate is None else ctx.products.linear(rows, gate, gate_bias)
            up_pre = ctx.products.linear(rows, up, up_bias)
            hidden = (
                kernels.activation(up_pre, None, kind) if gate is None else kernels.activation(gate_pre, up_pre, kind)
            )
            out = ctx.products.linear(hidden, down, down_bias)
            kernels.clear_empty(out, source)
        ctx.save_for_backward(rows, source, gate_pre, up_pre, hidden, gate, up, down)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out):
        rows, source, gate_pre, up_pre, hidden, gate, up, down = ctx.saved_tensors
        need_rows, *_, need_gate, need_up, need_down, need_gate_bias, need_up_bias, need_down_bias = (
            ctx.needs_input_grad
        )
        products = ctx.products
        if ctx.padded:  # empty rows lie among the others, and whatever their gradients are must not count
            grad = grad_out.clone(memory_format=_CONTIGUOUS)
            kernels.clear_empty(grad, source)
        else:
            grad = _from_a_whole_vector(grad_out.contiguous())
        grad_down = _wanted(need_down, products.outer, grad, hidden)
        grad_down_bias = _wanted(need_down_bias, products.sums, grad)

        grad_rows = grad_gate_pre = grad_up_pre = None
        if need_rows or need_gate or need_up or need_gate_bias or need_up_bias:
            grad_hidden = products.back(grad, down)
            if gate is None:
                grad_up_pre, _ = kernels.activation_backward(grad_hidden, up_pre, None, ctx.kind)
            else:
                grad_gate_pre, grad_up_pre = kernels.activation_backward(grad_hidden, gate_pre, up_pre, ctx.kind)
        if need_rows:
            grad_rows = products.back(grad_up_pre, up)
            if gate is not None:
                grad_rows = products.back(grad_gate_pre, gate, onto=grad_rows)
            kernels.clear_empty(grad_rows, source)
        return (
            grad_rows,
            *[None] * 5,
            _wanted(need_gate, products.outer, grad_gate_pre, rows),
            _wanted(need_up, products.outer, grad_up_pre, rows),
            grad_down,
            _wanted(need_gate_bias, products.sums, grad_gate_pre),
            _wanted(need_up_bias, products.sums, grad_up_pre),
            grad_down_bias,
        )


def _wanted(need: bool, product: Callable[..., torch.Tensor], *arguments) -> Optional:
    return product(*arguments) if need else None


def _from_a_whole_vector(rows: torch.Tensor) -> torch.Tensor:
    """`rows`, or a copy if they are a slice that begins within a vector."""
    return rows if rows.storage_offset() * rows.dtype.itemsize % _VECTOR_BYTES == 0 else rows.clone()


# ---- Expert by expert ------------------------------------------------------------------------------------------------


def _one_by_one(
    rows: torch.Tensor, map: DispatchMap, weights: ExpertWeights, kind: Activation, *, skip_empty: bool
) -> torch.Tensor:
    # unbind, not indexing: its backward stacks the experts' gradients once.
    gate, up, down, gate_bias, up_bias, down_bias = (
        ws[0].unbind(0) if len(ws) == 1 and ws[0].dim() == rank + 1 else ws for ws, rank in zip(weights.lists(), _RANKS)
    )

    def network(e: int, x: torch.Tensor) -> torch.Tensor:
        hidden = F.linear(x, up[e], up_bias[e] if up_bias else None)
        if gate:
            hidden = activate(F.linear(x, gate[e], gate_bias[e] if gate_bias else None), hidden, kind=kind)
        else:
            hidden = activate(hidden, kind=kind)
        return F.linear(hidden, down[e], down_bias[e] if down_bias else None)

    pieces = split_segments(rows, map)
    for i, piece in enumerate(pieces):
        e, between = divmod(i, 2)
        if between or e == map.num_experts:  # empty rows
            pieces[i] = torch.zeros_like(piece)
        elif len(piece) or not skip_empty:
            pieces[i] = network(e, piece)
    return torch.cat(pieces)
