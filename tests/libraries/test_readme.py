"""The example of README runs as it stands."""

from pathlib import Path

import torch

from tests.libraries.layers import package

TITLE = "### Layers of DeepSpeed, fairseq and others"
README = Path(__file__).parents[2] / "README.md"


def test_the_example(capsys):
    package("st_moe_pytorch")
    _, _, section = README.read_text().partition(TITLE)
    example = section.split("```python\n", 1)[1].split("```", 1)[0]
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    assert "is wrapped already: 16 experts down(gelu(gate(x)) * up(x) * scale)" in capsys.readouterr().out
    block = names["block"]
    assert type(block.moe).__module__.startswith("st_moe_pytorch")
    moments = names["optimizer"].state
    assert all(moments[parameter]["exp_avg"].isfinite().all() for parameter in block.parameters())
    assert torch.isfinite(names["out"].total_aux_loss)
