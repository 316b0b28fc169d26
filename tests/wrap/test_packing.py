"""The experts of a list in one storage: the same parameters, the same numbers, no second set of weights."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import tutelx
from tests import models
from tests.allocations import Allocations
from tests.libraries import standins
from tests.wrap.compare import assert_same, run, tokens, wrapped
from tutelx import Plan
from tutelx.ops.packing import is_packed, stacked
from tutelx.planner import FixedPlanner
from tutelx.wrapping import pack

GROUPED = FixedPlanner(Plan(expert_kernel="grouped"))


def layer(style=models.MoE, planner=GROUPED, **sizes) -> nn.Module:
    torch.manual_seed(0)
    return wrapped(style(**sizes), planner=planner)


def of(wrapped_layer: nn.Module, name: str) -> list[nn.Parameter]:
    return [expert.get_parameter(name) for expert in wrapped_layer.experts]


@pytest.mark.parametrize("expert", [models.SwiGLU, models.FFN])
def test_the_same_parameters_and_numbers(expert):
    ours, twin = (layer(expert=expert) for _ in range(2))
    before, values = dict(ours.named_parameters()), {k: v.clone() for k, v in ours.state_dict().items()}
    assert pack(ours)
    assert pack(ours), "packed already"
    for name in dict(ours.experts[0].named_parameters()):
        assert is_packed(of(ours, name)), name
    assert all(parameter is before[name] for name, parameter in ours.named_parameters())
    assert all(torch.equal(value, values[name]) for name, value in ours.state_dict().items())
    assert list(ours.state_dict()) == list(values)
    for count in (1, 33):
        assert_same(ours, twin, tokens(count, 16))
        assert_same(ours, ours.original, tokens(count, 16))


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizer_goes_on(make):
    """Its state belongs to the parameters, and those are the same."""
    ours, twin = layer(), layer()
    arguments = {"momentum": 0.9} if make is torch.optim.SGD else {}
    optimizers = [make(each.parameters(), lr=0.01, **arguments) for each in (ours, twin)]
    for step in range(4):
        if step == 2:
            ours(tokens(9, 16)).sum().backward()  # gradients that lie there stay, and are cleared as ever
            assert pack(ours)
        for each, optimizer in zip((ours, twin), optimizers):
            run(each, tokens(20, 16, seed=step))
            optimizer.step()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, twin.get_parameter(name), rtol=1e-5, atol=1e-6)
    assert is_packed(of(ours, "w1.weight"))


def test_memory_never_doubles():
    """w1, w2 and w3 of 8 experts are equally large: a third of the weights is the most that lives beside them."""
    ours = layer(model_dim=64, hidden_dim=128, num_experts=8)
    with Allocations(ours) as allocations:
        assert pack(ours)
    role = 8 * 64 * 128 * 4
    assert allocations.held == 3 * role + 8 * 64 * 4
    assert allocations.most == role
    assert allocations.more == 0


def test_a_call_makes_no_copy_of_the_weights():
    """Grouped products over a list stack it, unless it is packed."""
    most = {}
    for packed in (False, True):
        ours = layer(model_dim=64, hidden_dim=128, num_experts=8)
        if packed:
            pack(ours)
        with Allocations(ours) as allocations, torch.no_grad():
            ours(tokens(4, 64))
        most[packed] = allocations.most / allocations.held
    assert most[False] > 0.99
    assert most[True] < 0.1


def test_state_dicts_come_and_go(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    ours, other = layer(), models.MoE()
    pack(ours)
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    apart = io.BytesIO()
    torch.save(other.state_dict(), apart)
    assert len(file.getvalue()) <= 1.1 * len(apart.getvalue()), "every view has saved the whole storage"
    file.seek(0)
    other.load_state_dict(torch.load(file))
    torch.testing.assert_close(other(tokens(5, 16)), ours(tokens(5, 16)))
    safetensors.save_file(ours.state_dict(), tmp_path / "a.safetensors")
    loaded = safetensors.load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(value, loaded[name]) for name, value in ours.state_dict().items())
    fresh = models.MoE().state_dict()
    ours.load_state_dict(fresh)
    assert is_packed(of(ours, "w1.weight"))
    assert torch.equal(ours.experts[2].w1.weight, fresh["experts.2.w1.weight"])
    ours.load_state_dict(models.MoE().state_dict(), assign=True)
    assert not is_packed(of(ours, "w1.weight"))
    assert_same(ours, ours.original, tokens(9, 16))


def test_unwrap_gives_back_the_module_with_its_values():
    written = models.MoE()
    twin = copy.deepcopy(written)
    ours = wrapped(written)
    pack(ours)
    assert tutelx.unwrap(ours) is written
    assert_same(written, twin, tokens(9, 16))


def test_copies_stand_alone():
    ours = layer()
    pack(ours)
    twin = copy.deepcopy(ours)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert all(parameter.any() for parameter in ours.parameters())
    assert_same(ours, ours.original, tokens(9, 16))
    assert pack(twin)


def test_a_library_s_list():
    ours = tutelx.wrap(standins.DeepSpeedMoE(8, lambda: models.FFN(8, 12), 4, k=2), strict=True)
    assert pack(ours)
    assert is_packed([expert.net[0].weight for expert in ours.deepspeed_moe.experts.deepspeed_experts])


def test_what_others_look_at_stays():
    tied = layer()
    tied.experts[0].w1.weight = tied.experts[1].w1.weight
    shared = layer()
    outside = shared.experts[0].w1.weight.detach()
    slices = layer()
    whole = torch.randn(48, 16)
    slices.experts[0].w1.weight.data, slices.experts[1].w1.weight.data = whole[:24], whole[24:]
    for each in (tied, shared, slices):
        before = [parameter.data_ptr() for parameter in of(each, "w1.weight")]
        assert not pack(each)
        assert [parameter.data_ptr() for parameter in of(each, "w1.weight")] == before
        assert_same(each, each.original, tokens(9, 16))
    assert outside.data_ptr() == shared.experts[0].w1.weight.data_ptr()


def test_a_weight_changed_before_the_backward_is_an_error():
    """As everywhere in torch: a gradient of other weights than the forward's would be silently wrong."""
    ours = layer()
    pack(ours)
    y = ours(tokens(9, 16))
    with torch.no_grad():
        ours.experts[2].w2.weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"a weight of expert 2, of shape \(16, 24\), was changed in place"):
        y.sum().backward()


def test_the_stack_is_differentiable():
    weights = [nn.Parameter(torch.randn(2, 3, dtype=torch.float64)) for _ in range(3)]
    storage = torch.cat([weight.detach().flatten() for weight in weights])
    for e, weight in enumerate(weights):
        weight.data = storage[6 * e : 6 * e + 6].view(2, 3)
    assert is_packed(weights)
    assert stacked(weights).data_ptr() == storage.data_ptr()
    assert not is_packed(weights[::-1])
    assert not is_packed(weights[::2])
    assert torch.autograd.gradcheck(lambda *ws: stacked(ws).sin(), weights)
    assert torch.equal(stacked(weights[::2]), torch.stack(weights[::2]))
