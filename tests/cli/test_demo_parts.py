"""The demo's own pieces: model, text and batches, parity."""

import dataclasses

import pytest
import torch

import tutelx
from tests.cli.conftest import TINY
from tutelx.demo import model, parity, text
from tutelx.demo.settings import Settings
from tutelx.errors import InvalidTypeError


@pytest.fixture(scope="module")
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return text.training_batches(text.load(TINY), TINY)[0]


def test_the_model_does_not_see_the_future(batch):
    inputs, _ = batch
    language_model = model.build(TINY)
    logits = language_model(inputs)
    changed = inputs.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 256
    differs = (language_model(changed) != logits).flatten(2).any(-1).any(0)
    assert not differs[:9].any()
    assert differs[9:].all()


def test_weights_are_a_function_of_the_seed_and_leave_the_random_state():
    before = torch.random.get_rng_state()
    first, again, other = (model.build(s) for s in (TINY, TINY, _seeded(4)))
    assert torch.equal(torch.random.get_rng_state(), before)
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    assert not torch.equal(first.head.weight, other.head.weight)


def test_the_default_settings_are_those_of_the_issue():
    assert (Settings().experts, Settings().top_k) == (64, 2)


def test_a_setting_of_another_type_is_named():
    with pytest.raises(InvalidTypeError, match=r"steps=1\.5 is float, expected int"):
        Settings(steps=1.5)


def test_the_held_out_text_is_not_trained_on():
    loaded = text.load(TINY)
    assert len(loaded.training) + len(loaded.validation) == len(loaded.data)
    assert 0.04 < len(loaded.validation) / len(loaded.data) < 0.06
    assert torch.equal(torch.cat([loaded.training, loaded.validation]), loaded.data)


def test_a_batch_predicts_the_byte_that_follows_and_stays_inside_the_text():
    settings = _seeded(0, batch=200)
    data = torch.arange(40, dtype=torch.uint8)
    batches = text.Batches(data, settings, 3, seed=0)
    inputs, targets = batches[1]
    assert inputs.shape == targets.shape == (200, settings.seq)
    assert torch.equal(targets, inputs + 1)
    assert (inputs.min(), targets.max()) == (0, 39)
    assert torch.equal(batches[1][0], inputs)
    assert not torch.equal(batches[2][0], inputs)


def test_parity_finds_no_difference(batch):
    found = parity.compare(model.build(TINY), "float64", batch)
    assert found.passed
    assert found.tokens == 32
    assert max(found.logits, found.worst_gradient) < 1e-12


@pytest.mark.parametrize("top_k", [1, 4])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_parity_holds_where_a_gradient_is_zero_as_written(batch, top_k, dtype):
    found = parity.compare(model.build(dataclasses.replace(TINY, top_k=top_k)), dtype, batch)
    assert found.passed, found.failure()


def test_parity_finds_what_should_be_zero(monkeypatch, batch):
    def wrong(module, **options):
        module.blocks[0].moe.gate.weight.register_hook(lambda grad: grad + 1e-6)
        return module

    monkeypatch.setattr(tutelx, "wrap", wrong)
    found = parity.compare(model.build(dataclasses.replace(TINY, top_k=1)), "float64", batch)
    assert found.worst_gradient_name == "blocks.0.moe.gate.weight"
    assert not found.passed


@pytest.mark.parametrize("factor", [1 + 1e-8, float("nan")])
def test_parity_names_the_gradient_that_differs(monkeypatch, batch, factor):
    def wrong(module, **options):
        module.blocks[0].moe.gate.weight.register_hook(lambda grad: grad * factor)
        return module

    monkeypatch.setattr(tutelx, "wrap", wrong)
    found = parity.compare(model.build(TINY), "float64", batch)
    assert not found.passed
    assert found.logits == 0
    assert found.worst_gradient_name == "blocks.0.moe.gate.weight"


def test_parity_finds_a_gradient_that_is_missing(monkeypatch, batch):
    def wrong(module, **options):
        module.blocks[1].moe.experts[2].w1.weight.requires_grad_(False)
        return module

    monkeypatch.setattr(tutelx, "wrap", wrong)
    found = parity.compare(model.build(TINY), "float64", batch)
    assert (found.worst_gradient, found.worst_gradient_name) == (float("inf"), "blocks.1.moe.experts.2.w1.weight")
    assert not found.passed


def _seeded(seed: int, **changes) -> Settings:
    return dataclasses.replace(TINY, seed=seed, **changes)
