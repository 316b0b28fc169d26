"""The example of README runs as it stands, and what it saves is a checkpoint of Tutel."""

from pathlib import Path

import torch

from tutelx.integrations.tutel import moe

README = Path(__file__).parents[2] / "README.md"
HEADING = "### Scripts of Tutel"


def example() -> str:
    return README.read_text().split(HEADING, 1)[1].split("```python\n", 1)[1].split("```", 1)[0]


def test_the_example(tmp_path, capsys):
    names = {"tokens": torch.randn(3, 8, 32), "path": tmp_path / "layer.pt"}
    exec(compile(example(), "README.md", "exec"), names)
    layer = names["layer"]
    counts = layer.dispatch_count.tolist()
    assert sum(counts) == 24  # one choice of each token, none dropped
    assert f"{counts} [0, 1]" in capsys.readouterr().out
    assert all(p.grad is not None for p in layer.parameters())
    saved = torch.load(names["path"])
    assert set(saved) == {
        "_num_global_experts",
        "gates.0.wg.weight",
        *(f"experts.batched_{name}" for name in ("fc1_w", "fc2_w", "fc1_bias", "fc2_bias")),
    }
    other = moe.moe_layer(
        {"type": "top", "k": 2}, 32, {"type": "ffn", "num_experts_per_device": 2, "hidden_size_per_expert": 64}
    )
    other.load_state_dict(saved)
    x = torch.randn(5, 32)
    assert torch.equal(other(x), layer(x))
