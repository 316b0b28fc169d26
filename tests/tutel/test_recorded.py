"""The losses that Tutel itself prints, to the printed digit.

Recorded from Tutel 0.4 (microsoft/Tutel, ac0e51b) built for CPU, with

    python tutel/examples/helloworld.py --device cpu --batch_size 2 --num_tokens 64 --model_dim 32 --hidden_size 64 \
        --num_steps 6 --top ...
"""

import pytest
import torch
from torch.nn import functional as F

from tutelx.integrations.tutel import moe

RECORDED = {
    "--top 2": "4.88009 4.86587 4.85167 4.83749 4.82333 4.80920",
    "--top 1": "5.16478 5.15262 5.14049 5.12838 5.11631 5.10426",
    "--top 2 --num_local_experts 4 --capacity_factor 0": "5.04639 5.02960 5.01285 4.99615 4.97948 4.96285",
    "--top 2 --num_local_experts 4 --capacity_factor -0.5 --l_aux_wt 0.1": (
        "5.09856 5.08542 5.07232 5.05926 5.04622 5.03323"
    ),
    "--top 2 --num_local_experts 4 --dtype float64 --a2a_ffn_overlap_degree 3 --capacity_factor 0.6": (
        "5.07139 5.05495 5.03855 5.02219 5.00586 4.98957"
    ),
    "--top 2 --expert_type llama_ffn": "4.15890 4.15890 4.15890 4.15890 4.15890 4.15890",
}


def options(line: str) -> dict[str, str]:
    words = line.split()
    return {name.removeprefix("--"): value for name, value in zip(words[::2], words[1::2])}


@pytest.mark.parametrize("line", RECORDED)
def test_printed_losses(line):
    given = options(line)
    dtype = getattr(torch, given.get("dtype", "float32"))
    torch.set_default_dtype(dtype)
    try:
        layer = moe.moe_layer(
            gate_type={
                "type": "top",
                "k": int(given["top"]),
                "fp32_gate": True,
                "capacity_factor": float(given.get("capacity_factor", 1.0)),
            },
            experts={
                "type": given.get("expert_type", "ffn"),
                "num_experts_per_device": int(given.get("num_local_experts", 2)),
                "hidden_size_per_expert": 64,
                "activation_fn": lambda x: F.relu(x),
            },
            model_dim=32,
            scan_expert_func=lambda name, param: setattr(param, "skip_allreduce", True),
            seeds=(1, 1, 1),
            a2a_ffn_overlap_degree=int(given.get("a2a_ffn_overlap_degree", 1)),
            parallel_type="adaptive:1",
            use_2dh=False,
        )
    finally:
        torch.set_default_dtype(torch.float32)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-4)
    torch.manual_seed(0)
    x = torch.randn(2, 64, 32).to(dtype)
    target = torch.zeros(2, dtype=torch.long)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = F.nll_loss(F.log_softmax(layer(x).sum(dim=2), dim=1), target)
        if "l_aux_wt" in given:
            loss = loss + float(given["l_aux_wt"]) * layer.l_aux
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # Half a unit of the last digit, and what float32 rounds: in float64 one of them is 4.809195000.
    assert losses == pytest.approx([float(printed) for printed in RECORDED[line].split()], rel=0, abs=5e-6 + 1e-6)
