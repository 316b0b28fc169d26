"""Tutel: its encode and decode over the padded layout, and a dropless layer made of them.

T tokens, D model dim, E experts, C capacity: the load of the fullest expert, so that nothing is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from tutelx.bench.peers import Ways
from tutelx.bench.subject import Tensors, Way
from tutelx.bench.subjects.layer import LayerInputs, gradients
from tutelx.bench.subjects.rows import RowInputs


@dataclass
class PaddedInputs:
    """critical: what Tutel calls the routing: E, indices, locations and gates of each choice, C."""

    data: torch.Tensor
    critical: tuple[Any, ...]
    padded_row: torch.Tensor


def _pad(inputs: RowInputs, data: torch.Tensor) -> PaddedInputs:
    map, capacity = inputs.map, max(1, int(inputs.map.counts.max()))
    expert_R = torch.repeat_interleave(torch.arange(map.num_experts, device=data.device), map.counts.long())
    location_R = torch.arange(map.num_rows, device=data.device) - map.offsets[expert_R].long()
    expert_TK = expert_R[map.dest.long()].int()
    location_TK = location_R[map.dest.long()].int()
    weights = inputs.weights_TK.to(data.dtype)
    columns = [[part.contiguous() for part in both.unbind(1)] for both in (expert_TK, location_TK, weights)]
    return PaddedInputs(data, (map.num_experts, *columns, capacity), expert_R * capacity + location_R)


def _pad_rows(inputs: RowInputs) -> PaddedInputs:
    padded = _pad(inputs, inputs.rows_RD)
    num_experts, capacity = padded.critical[0], padded.critical[-1]
    padded.data = inputs.rows_RD.new_zeros((num_experts * capacity, inputs.rows_RD.shape[1]))
    padded.data[padded.padded_row] = inputs.rows_RD
    return padded


def ways(device: torch.device) -> Ways:
    from tutel import moe

    def layer(inputs: LayerInputs) -> Tensors:
        x, router, gate, up, down = inputs.leaves
        scores = torch.softmax(F.linear(x, router).float(), dim=1)
        critical, _ = moe.top_k_routing(scores, inputs.top_k, capacity_factor=0)
        rows_ECD = moe.fast_encode(x, critical)
        hidden = F.silu(torch.bmm(rows_ECD, gate.transpose(1, 2))) * torch.bmm(rows_ECD, up.transpose(1, 2))
        return gradients(moe.fast_decode(torch.bmm(hidden, down.transpose(1, 2)), critical), inputs)

    return {
        "encode": Way(
            name="tutel",
            call=lambda inputs: moe.fast_encode(inputs.data, inputs.critical),
            prepare=lambda inputs: _pad(inputs, inputs.x_TD),
            finish=lambda inputs, output: output.reshape(-1, output.shape[-1])[inputs.padded_row],
        ),
        "decode": Way(
            name="tutel",
            call=lambda inputs: moe.fast_decode(inputs.data, inputs.critical),
            prepare=_pad_rows,
        ),
        "layer": Way(name="tutel", call=layer),
    }
