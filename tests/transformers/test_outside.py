"""MoE layers of transformers that do not ask its registry: those that can be run all the same, and the others."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="transformers is not installed")

import transformers

import tutelx
from tests.transformers.families import Family, configuration, experts_of, families, model_class, spread
from tests.transformers.test_families import assert_same, run, tokens
from tutelx.integrations.transformers import setting_of
from tutelx.wrapping import explain

# Model class, changes to the tiny configuration, the modules that are left alone, and what of them has no place.
OUTSIDE = {
    "llama4": ("Llama4ForCausalLM", {"interleave_moe_layer_step": 1}, "Llama4TextMoe", "router"),
    "dbrx": ("DbrxForCausalLM", {"attn_config": {"rope_theta": 1e4}, "n_layers": 2}, "DbrxFFN", "experts"),
    "jetmoe": ("JetMoeForCausalLM", {}, "JetMoeMoE JetMoeMoA", "input_linear"),
    "longcat_flash": ("LongcatFlashForCausalLM", {"num_layers": 2}, "LongcatFlashMoE", "experts"),
    "switch_transformers": ("SwitchTransformersModel", None, "SwitchTransformersSparseMLP", "router"),
    "nllb_moe": ("NllbMoeModel", None, "NllbMoeSparseMLP", "router"),
    "doge": ("DogeForCausalLM", {"is_moe": True}, "DogeCDMoE", "down_embed"),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_known_families_are_left_alone_with_a_reason(name):
    kind, changes, modules, attribute = OUTSIDE[name]
    model_type = getattr(transformers, kind)
    config = model_type.config_class() if changes is None else configuration(model_type, **changes)
    with torch.device("meta"):
        model = model_type(config)
    reports = explain(model)
    assert {report.kind for report in reports} == set(modules.split())
    assert all(not report.recognised and report.attribute == attribute and report.reason for report in reports)


def step3p7():
    family = Family("step3p7", "transformers.models.step3p7.modeling_step3p7", ())
    torch.manual_seed(0)
    kind = model_class(family)
    # The second of the two layers is clamped.
    model = kind(configuration(kind, mlp_layer_types=["sparse", "sparse"], swiglu_limits=[0, 0.5]))
    spread(model)
    return model.double().eval()


@pytest.mark.parametrize("copied", [False, True])
def test_experts_like_the_registered_ones_run_too(copied):
    model = step3p7()
    expected = run(model, tokens())
    assert experts_of(model) == {}
    tutelx.wrap(model, strict=True, verify=True)
    wrapped = copy.deepcopy(model) if copied else model
    reports = explain(wrapped)
    assert [(report.kind, report.already) for report in reports] == [("Step3p7Experts", True)] * 2
    assert_same(run(wrapped, tokens()), expected, 1e-10)
    for report in reports:
        module = wrapped.get_submodule(report.name)
        assert int(setting_of(module).stats.tokens_per_expert.sum()) == 2 * tokens().numel()
    tutelx.unwrap(wrapped)
    assert all("forward" not in vars(module) for module in wrapped.modules())
    assert_same(run(wrapped, tokens()), expected, 0.0)


class NewExperts(nn.Module):
    """What a later version of the library may bring."""

    __module__ = "transformers.models.later.modeling_later"

    def __init__(self) -> None:
        super().__init__()
        self.bank = nn.Parameter(torch.randn(4, 8, 8))

    def forward(self, x):
        return torch.einsum("td,edh->th", x, self.bank)


class LaterSparseMoeBlock(nn.Module):
    __module__ = "transformers.models.later.modeling_later"

    def __init__(self) -> None:
        super().__init__()
        self.experts = NewExperts()

    def forward(self, x):
        return self.experts(x)


def test_a_family_that_is_not_known_is_reported_and_not_broken(caplog):
    model = nn.Sequential(nn.Linear(8, 8), LaterSparseMoeBlock())
    x = torch.randn(3, 8)
    expected = model(x)
    (report,) = explain(model)
    assert (report.name, report.kind, report.attribute) == ("1", "LaterSparseMoeBlock", "forward")
    with caplog.at_level(logging.WARNING, logger="tutelx"):
        tutelx.wrap(model)
    assert "1 (LaterSparseMoeBlock) is left alone: `forward` does not ask the registry" in caplog.text
    assert torch.equal(model(x), expected)


def test_dense_models_have_nothing_to_report():
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(configuration(transformers.LlamaForCausalLM))
    assert explain(model) == []


def test_every_registered_family_is_found_by_its_modules():
    """The names that an unknown family is noticed by are those that the known ones have."""
    from tutelx.integrations.transformers.outside import _NAME

    assert [name for family in families() for name in family.experts if not _NAME.search(name)] == []
