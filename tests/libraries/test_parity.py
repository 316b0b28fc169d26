"""Layers of other libraries give the same numbers wrapped: all that they return and leave behind, all gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_flatten

import tutelx
from tests.libraries import standins
from tests.libraries.layers import LAYERS, M, alone, torchscale
from tutelx.integrations.libraries import LibraryMoE

pytestmark = pytest.mark.usefixtures(alone.__name__)
__all__ = ["alone"]  # a fixture


def tokens(*shape: int, seed: int = 3) -> torch.Tensor:
    """Every other token is the same, so that a capacity drops some."""
    x = torch.randn((*shape, M), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x[:, ::2] = x[0, 0]
    return x


def left_behind(layer: nn.Module) -> list:
    return [getattr(module, "l_aux", None) for module in layer.modules()] + [list(pair) for pair in standins.saved]


def outcome(layer: nn.Module, x: torch.Tensor, **named):
    """What it returns and leaves, the gradients of a sum over all of that, and the random state behind it."""
    standins.saved.clear()
    layer.zero_grad(set_to_none=True)
    leaf = x.detach().clone().requires_grad_()
    torch.manual_seed(11)
    y = layer(leaf, **named)
    state = torch.get_rng_state()
    values, structure = tree_flatten([y, left_behind(layer)])
    values = [value for value in values if isinstance(value, torch.Tensor)]
    weigh = torch.Generator().manual_seed(5)
    total = sum(
        (value * torch.randn(value.shape, generator=weigh)).double().sum() for value in values if value.requires_grad
    )
    total.backward()
    grads = {"x": leaf.grad} | {name: p.grad for name, p in layer.named_parameters()}
    return structure, [value.detach() for value in values], grads, state


def assert_same(ours, theirs, limit: float) -> None:
    assert ours[0] == theirs[0]
    for one, other in zip(ours[1], theirs[1]):
        torch.testing.assert_close(one, other, rtol=limit, atol=limit)
    assert ours[2].keys() == theirs[2].keys()
    for name, expected in theirs[2].items():
        assert (ours[2][name] is None) == (expected is None), name
        if expected is not None:
            torch.testing.assert_close(ours[2][name], expected, rtol=limit, atol=limit)
    assert torch.equal(ours[3], theirs[3]), "another number of draws"


def dtype_of(name: str) -> torch.dtype:
    """fairscale runs in float32 only."""
    return torch.float32 if "fairscale" in name else torch.float64


def build(name: str, dtype: torch.dtype | None = None) -> nn.Module:
    """Process groups cannot be copied: two of one seed are the same layer twice."""
    torch.manual_seed(1)
    return LAYERS[name]().to(dtype or dtype_of(name))


def pair(name: str, dtype: torch.dtype | None = None) -> tuple[nn.Module, nn.Module]:
    """Wrapped, and as written."""
    return tutelx.wrap(build(name, dtype), strict=True, verify=True), build(name, dtype)


def replaced(layer: nn.Module) -> list[LibraryMoE]:
    return [module for module in layer.modules() if isinstance(module, LibraryMoE)]


@pytest.mark.parametrize("name", LAYERS)
def test_the_numbers(name):
    # The gates of most go through float32 whatever the dtype.
    layer, written = pair(name)
    assert len(replaced(layer)) == 1
    assert list(layer.state_dict()) == list(written.state_dict())
    for training in (True, False):
        layer.train(training)
        written.train(training)
        x = tokens(4, 12).to(dtype_of(name))
        assert_same(outcome(layer, x), outcome(written, x), 1e-6 if x.dtype == torch.float64 else 2e-5)
    assert 0 < int(replaced(layer)[0].stats.tokens_per_expert.sum()) <= 4 * 12 * 4


@pytest.mark.parametrize("name", ["st-moe", "hierarchy", "DeepSpeed stand-in top-2", "Megablocks MoE stand-in"])
def test_in_float32(name):
    layer, written = pair(name, torch.float32)
    x = tokens(4, 12).float()
    assert_same(outcome(layer, x), outcome(written, x), 2e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_unwrap_gives_back_the_very_module(name):
    written = build(name)
    modules, parameters = dict(written.named_modules()), dict(written.named_parameters())
    layer = tutelx.wrap(written)
    assert len(replaced(layer)) == 1
    assert tutelx.wrap(layer) is layer
    assert all(p is parameters[key] for key, p in layer.named_parameters())
    layer.eval()
    assert tutelx.unwrap(layer) is written
    assert dict(written.named_modules()) == modules
    assert not any(module.training for module in modules.values())


@pytest.mark.parametrize("name", ["st-moe", "mixture", "DeepSpeed stand-in top-2", "Megablocks dMoE stand-in"])
def test_an_optimizer_made_before_steps_the_same(name):
    theirs, ours = build(name), build(name)
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9) for layer in (ours, theirs)]
    ours = tutelx.wrap(ours, strict=True)
    for step in range(3):
        for layer, optimizer in zip((ours, theirs), optimizers):
            outcome(layer, tokens(2, 8, seed=step))
            optimizer.step()
    for key, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, theirs.get_parameter(key), rtol=1e-6, atol=1e-7)


def test_the_noise_of_a_call_is_the_original_s():
    layer, written = pair("st-moe")
    x = tokens(2, 8)
    noise = {"noise_gates": True, "noise_mult": 0.5}
    assert_same(outcome(layer, x, **noise), outcome(written, x, **noise), 1e-6)


def test_tokens_that_are_not_used():
    layer, written = pair("DeepSpeed stand-in top-2")
    x, used = tokens(2, 8), (torch.arange(16) % 3 > 0).double()
    assert_same(outcome(layer, x, used_token=used), outcome(written, x, used_token=used), 1e-6)


@pytest.mark.parametrize("name", ["torchscale top-1", "torchscale top-2"])
def test_a_padding_mask(name):
    layer, written = pair(name)
    x, mask = tokens(4, 6), torch.arange(24).reshape(4, 6) % 5 == 0
    ours, theirs = (outcome(each, x, input_padding_mask=mask) for each in (layer, written))
    assert_same(ours, theirs, 1e-6)
    assert layer.metadata.keys() == written.metadata.keys()


def test_a_batch_that_fairseq_fills_up(monkeypatch):
    monkeypatch.setitem(LAYERS, "of six", lambda: torchscale(batch_size=6))
    layer, written = pair("of six")
    assert_same(outcome(layer, tokens(6, 4)), outcome(written, tokens(6, 4)), 1e-6)
    assert layer.stats is not None
    layer = tutelx.wrap(tutelx.unwrap(layer))
    x = tokens(4, 6)
    assert_same(outcome(layer, x), outcome(written, x), 1e-6)
    assert layer.stats is None, "the original is meant to run"


@pytest.mark.parametrize("name", ["st-moe", "mixture", "hierarchy", "DeepSpeed stand-in top-1", "fairscale"])
def test_autocast(name):
    layer, written = pair(name, torch.float32)
    x = tokens(4, 12).float()
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = outcome(layer, x), outcome(written, x)
    for one, other in zip(ours[1], theirs[1]):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=5e-2, atol=5e-2)
