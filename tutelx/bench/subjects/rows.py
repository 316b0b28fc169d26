"""encode, decode and their backwards, clear_empty: what moves rows. T tokens, K choices, R rows, D model dim."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from tutelx import ops
from tutelx.bench import limits
from tutelx.bench.shapes import Shape
from tutelx.bench.subject import Subject, Tensors, Way, one_hot_unfit
from tutelx.bench.subjects.route import ids_of
from tutelx.ops import reference
from tutelx.ops._library import calls
from tutelx.testing import cases
from tutelx.types import DispatchMap


@dataclass
class RowInputs:
    """token_R: the token of each row, which is what plain torch indexes with. Tensors that an op does not take are
    left empty: they would only swell the working set."""

    x_TD: torch.Tensor
    rows_RD: torch.Tensor
    weights_TK: torch.Tensor
    token_R: torch.Tensor
    map: DispatchMap


def _maker(*needs: Literal["x", "rows"]):
    """`x` stands for the gradient of y too."""

    def make(shape: Shape, dtype: torch.dtype) -> RowInputs:
        map = ops.route(ids_of(shape), shape.E)
        weights = torch.softmax(cases.tensor(shape.T, shape.K, seed=3), dim=1)
        nothing = torch.empty(0, dtype=dtype)
        return RowInputs(
            x_TD=cases.tensor(shape.T, shape.D, dtype=dtype, seed=1) if "x" in needs else nothing,
            rows_RD=cases.tensor(shape.rows, shape.D, dtype=dtype, seed=2) if "rows" in needs else nothing,
            weights_TK=weights.to(dtype) if dtype == torch.float64 else weights,
            token_R=map.source.long() // shape.K,
            map=map,
        )

    return make


def _half_empty(shape: Shape, dtype: torch.dtype) -> RowInputs:
    """The padded layout with twice the rows that arrive, each expert with as many as the others."""
    even = torch.arange(shape.rows, dtype=torch.int32).remainder(shape.E).view(shape.T, shape.K)
    map = ops.route(even, shape.E, 2 * -(-shape.rows // shape.E), layout="padded")
    nothing = torch.empty(0, dtype=dtype)
    rows = cases.tensor(map.num_rows, shape.D, dtype=dtype, seed=2)
    return RowInputs(x_TD=nothing, rows_RD=rows, weights_TK=nothing, token_R=torch.empty(0), map=map)


def _zeroed(inputs: RowInputs) -> torch.Tensor:
    inputs.rows_RD[inputs.map.source < 0] = 0
    return inputs.rows_RD


def _masked(inputs: RowInputs) -> torch.Tensor:
    return inputs.rows_RD.masked_fill_((inputs.map.source < 0).unsqueeze(1), 0)


def _weights_of_rows(inputs: RowInputs) -> torch.Tensor:
    return inputs.weights_TK.reshape(-1)[inputs.map.source.long()].to(inputs.rows_RD.dtype).unsqueeze(1)


def _mask_RT(inputs: RowInputs, dtype: torch.dtype) -> torch.Tensor:
    return torch.nn.functional.one_hot(inputs.token_R, inputs.map.dest.shape[0]).to(dtype)


def _sum_into_tokens(inputs: RowInputs, rows_RD: torch.Tensor) -> torch.Tensor:
    zeros = rows_RD.new_zeros((inputs.map.dest.shape[0], rows_RD.shape[1]))
    return zeros.index_add_(0, inputs.token_R, rows_RD)


def _gather_bmm(inputs: RowInputs) -> torch.Tensor:
    gathered_TKD = inputs.rows_RD[inputs.map.dest.long()]
    return torch.bmm(inputs.weights_TK.to(gathered_TKD.dtype).unsqueeze(1), gathered_TKD).squeeze(1)


def _decode_backward(inputs: RowInputs) -> Tensors:
    grad_RD = inputs.x_TD.index_select(0, inputs.token_R)
    grad_weights = torch.empty_like(inputs.weights_TK)
    products = (grad_RD * inputs.rows_RD).sum(dim=1, dtype=grad_weights.dtype)
    grad_weights.view(-1)[inputs.map.source.long()] = products
    return grad_RD * _weights_of_rows(inputs), grad_weights


def _decode_backward_bmm(inputs: RowInputs) -> Tensors:
    grad_rows = inputs.x_TD.index_select(0, inputs.token_R) * _weights_of_rows(inputs)
    gathered_TKD = inputs.rows_RD[inputs.map.dest.long()]
    grad_weights = torch.bmm(gathered_TKD, inputs.x_TD.unsqueeze(2)).squeeze(2)
    return grad_rows, grad_weights.to(inputs.weights_TK.dtype)


SUBJECTS = (
    Subject(
        op="encode",
        make=_maker("x"),
        ours=lambda inputs: ops.encode(inputs.x_TD, inputs.map),
        plain=(
            Way(name="index_select", call=lambda inputs: inputs.x_TD.index_select(0, inputs.token_R)),
            Way(
                name="one-hot einsum",
                call=lambda inputs: torch.einsum("rt,td->rd", _mask_RT(inputs, inputs.x_TD.dtype), inputs.x_TD),
                unfit=one_hot_unfit,
            ),
        ),
        reference=lambda inputs: reference.encode(inputs.x_TD, inputs.map),
        must_move=limits.encode,
    ),
    Subject(
        op="encode_backward",
        make=_maker("rows"),
        ours=lambda inputs: calls.encode_backward(inputs.rows_RD, inputs.map.dest),
        plain=(
            Way(name="index_add", call=lambda inputs: _sum_into_tokens(inputs, inputs.rows_RD)),
            Way(name="gather + sum", call=lambda inputs: inputs.rows_RD[inputs.map.dest.long()].sum(dim=1)),
        ),
        reference=lambda inputs: reference.decode(inputs.rows_RD, inputs.map, torch.ones_like(inputs.weights_TK)),
        must_move=limits.encode,
        gradients=True,
    ),
    Subject(
        op="decode",
        make=_maker("rows"),
        ours=lambda inputs: ops.decode(inputs.rows_RD, inputs.map, inputs.weights_TK),
        plain=(
            Way(
                name="index_add",
                call=lambda inputs: _sum_into_tokens(inputs, inputs.rows_RD * _weights_of_rows(inputs)),
            ),
            Way(name="gather + bmm", call=_gather_bmm),
            Way(
                name="one-hot einsum",
                call=lambda inputs: torch.einsum(
                    "rt,rd->td",
                    _mask_RT(inputs, inputs.rows_RD.dtype) * _weights_of_rows(inputs),
                    inputs.rows_RD,
                ),
                unfit=one_hot_unfit,
            ),
        ),
        reference=lambda inputs: reference.decode(inputs.rows_RD, inputs.map, inputs.weights_TK),
        must_move=limits.encode,
    ),
    Subject(
        op="decode_backward",
        make=_maker("x", "rows"),
        ours=lambda inputs: calls.decode_backward(
            inputs.x_TD, inputs.rows_RD, inputs.map.dest, inputs.map.source, inputs.weights_TK
        ),
        plain=(
            Way(name="index_select", call=_decode_backward),
            Way(name="gather + bmm", call=_decode_backward_bmm),
        ),
        must_move=limits.decode_backward,
        gradients=True,
    ),
    Subject(
        op="clear_empty",
        make=_half_empty,
        ours=lambda inputs: ops.clear_empty(inputs.rows_RD, inputs.map),
        plain=(Way(name="index_put", call=_zeroed), Way(name="masked_fill", call=_masked)),
        must_move=limits.clear_empty,
    ),
)
