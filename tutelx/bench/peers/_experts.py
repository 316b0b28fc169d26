"""The experts of a Qwen3-MoE block of transformers 5, in one of the library's ways, behind a router in plain torch."""

from __future__ import annotations

import torch

from tutelx.bench.peers import Ways
from tutelx.bench.peers._fused import FusedInputs, fuse, split
from tutelx.bench.subject import Tensors, Way


def ways_of(name: str, implementation: str) -> Ways:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    def layer(inputs: FusedInputs) -> Tensors:
        E, twice, D = inputs.gate_up.shape
        config = Qwen3MoeConfig(num_experts=E, hidden_size=D, moe_intermediate_size=twice // 2, hidden_act="silu")
        config._experts_implementation = implementation
        with torch.device("meta"):
            experts = Qwen3MoeExperts(config)
        # Not as Parameters, which would be other leaves than those that gradients are asked for.
        held: dict = experts._parameters
        held.update(gate_up_proj=inputs.gate_up, down_proj=inputs.down)
        weights_TK, ids_TK = inputs.routing()
        return inputs.gradients(experts(inputs.x_TD, ids_TK, weights_TK.to(inputs.x_TD)))

    return {"layer": Way(name=name, call=layer, prepare=fuse, finish=split)}
