"""transformers 5: its grouped_mm experts, behind a router in plain torch."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch.nn import functional as F

from tutelx.bench.peers import Ways
from tutelx.bench.peers._fused import FusedInputs, fuse, split
from tutelx.bench.subject import Tensors, Way


def ways(device: torch.device) -> Ways:
    from transformers.integrations.moe import grouped_mm_experts_forward

    def layer(inputs: FusedInputs) -> Tensors:
        weights_TK, ids_TK = inputs.routing()
        module = SimpleNamespace(
            num_experts=inputs.gate_up.shape[0],
            gate_up_proj=inputs.gate_up,
            down_proj=inputs.down,
            has_gate=True,
            has_bias=False,
            is_transposed=False,
            is_concatenated=True,
            has_post_expert_norm=False,
            _is_expert_parallel=False,
            act_fn=F.silu,
            _apply_gate=_apply_gate,
        )
        return inputs.gradients(grouped_mm_experts_forward(module, inputs.x_TD, ids_TK, weights_TK.to(inputs.x_TD)))

    return {"layer": Way(name="transformers", call=layer, prepare=fuse, finish=split)}


def _apply_gate(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
