"""ScatterMoE: its fused gather, product and scatter, behind a router in plain torch."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from tutelx.bench.peers import Ways, need_cuda
from tutelx.bench.peers._fused import FusedInputs, fuse, split
from tutelx.bench.subject import Tensors, Way


def ways(device: torch.device) -> Ways:
    from scattermoe.parallel_experts import flatten_sort_count, parallel_linear

    need_cuda(device)

    def layer(inputs: FusedInputs) -> Tensors:
        weights_TK, ids_TK = inputs.routing()
        experts, slots, offsets = flatten_sort_count(ids_TK, num_experts=inputs.gate_up.shape[0])
        gate_up = parallel_linear(
            inputs.x_TD, inputs.gate_up.permute(0, 2, 1), inputs.top_k, experts, slots, offsets, grouped_out=True
        )
        gate, up = gate_up.chunk(2, dim=-1)
        y_TD = parallel_linear(
            F.silu(gate) * up,
            inputs.down.permute(0, 2, 1),
            1,
            experts,
            slots,
            offsets,
            gates=weights_TK.to(inputs.x_TD.dtype),
            grouped_in=True,
        )
        return inputs.gradients(y_TD)

    return {"layer": Way(name="scattermoe", call=layer, prepare=fuse, finish=split)}
