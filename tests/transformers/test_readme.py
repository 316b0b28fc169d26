"""The example of README runs as it stands."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from tests.transformers.families import build, families
from tests.transformers.test_families import tokens

README = Path(__file__).parents[2] / "README.md"


def example() -> str:
    section = README.read_text().split("### Models of transformers 5", 1)[1]
    return section.split("```python\n", 1)[1].split("```", 1)[0]


def test_the_example(tmp_path, capsys):
    (family,) = [each for each in families() if each.name == "qwen3_moe"]
    written = build(family)
    written.save_pretrained(tmp_path / "given")
    names = {"path": tmp_path / "given", "folder": tmp_path / "saved", "tokens": tokens()}
    exec(compile(example(), "README.md", "exec"), names)
    shown = capsys.readouterr().out
    assert shown.count("is wrapped already: 4 experts 32 -> 16 -> 32") == 2
    loaded = type(written).from_pretrained(tmp_path / "saved")
    assert all(torch.equal(p, written.get_parameter(name)) for name, p in loaded.named_parameters())
    written(tokens(), labels=tokens()).loss.backward()
    for name, parameter in names["model"].named_parameters():
        torch.testing.assert_close(parameter.grad, written.get_parameter(name).grad, rtol=1e-4, atol=1e-5)
