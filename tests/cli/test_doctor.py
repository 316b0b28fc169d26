"""tutelx doctor: what it finds in this installation, in a broken one, and in a model."""

import json

import pytest

from tutelx.cli import _doctor_installation as installation
from tutelx.cli import main


def test_this_installation_is_sound(capsys):
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for what in ("Python", "torch", "extension", "threads", "C++ compiler", "CUDA", "transformers"):
        assert what in shown
    assert "wrong" not in shown


def finding(what: str) -> installation.Finding:
    (found,) = [each for each in installation.findings() if each.what == what]
    return found


@pytest.mark.parametrize(
    ("version", "state", "advice"),
    [("2.9.1+cpu", "wrong", "needs 2.10 or newer"), ("2.10.0", "ok", ""), (None, "wrong", "pip install torch")],
)
def test_versions_of_torch(monkeypatch, version, state, advice):
    monkeypatch.setattr(installation, "_version_of", lambda package: version)
    found = finding("torch")
    assert (found.state, found.advice) == (state, advice)


def test_what_is_broken_is_an_exit_code_and_a_reason(monkeypatch, capsys):
    def broken():
        raise OSError("undefined symbol: tutelx")

    broken.__name__ = "_extension"
    monkeypatch.setattr(installation, "_extension", broken)
    assert main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert "wrong" in shown
    assert "OSError: undefined symbol: tutelx" in shown


@pytest.mark.parametrize(
    ("cuda", "available", "kernels", "state"),
    [
        (None, False, False, "note"),
        ("13.0", False, False, "note"),
        ("13.0", True, False, "wrong"),
        ("13.0", True, True, "ok"),
    ],
)
def test_cuda(monkeypatch, cuda, available, kernels, state):
    import torch

    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "a card")
    monkeypatch.setattr(installation, "_has_cuda_kernels", lambda: kernels)
    assert finding("CUDA").state == state


QWEN = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_size": 4096,
    "num_hidden_layers": 3,
    "num_experts": 128,
    "moe_intermediate_size": 1536,
}


def test_a_model_by_its_configuration(tmp_path, capsys):
    pytest.importorskip("transformers", reason="transformers is not installed")
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    for path in (tmp_path, tmp_path / "config.json"):
        assert main(["doctor", "--model", str(path)]) == 0
        shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
        assert "model.layers.*.mlp.experts Qwen3MoeExperts 3 yes 128 experts 4096 -> 1536 -> 4096" in shown
        assert "No weight was loaded" in shown


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llama"}, "nothing in it looks like an MoE layer"),
        ({"model_type": "jetmoe", "num_hidden_layers": 1}, "`input_linear` does not ask the registry"),
    ],
)
def test_a_model_that_would_be_left_alone(tmp_path, capsys, config, message):
    pytest.importorskip("transformers", reason="transformers is not installed")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["doctor", "--model", str(tmp_path)]) == 1
    assert message in " ".join(capsys.readouterr().out.replace("│", " ").split())


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "is neither a config.json nor a folder with one"), ("{", "cannot be built: ")],
)
def test_what_is_no_configuration(tmp_path, capsys, content, message):
    pytest.importorskip("transformers", reason="transformers is not installed")
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert main(["doctor", "--model", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
