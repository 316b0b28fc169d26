"""Random parts: one generator, reproducible, saved with the gate."""

import copy

import pytest
import torch

from tests.cases import tensor
from tutelx import MoE, gates

STOCHASTIC = {
    "NoisyTopK": lambda g: gates.NoisyTopK(generator=g),
    "GShardTop2": lambda g: gates.GShardTop2(generator=g),
    "Switch": lambda g: gates.Switch(jitter=0.9, generator=g),
    "STMoE": lambda g: gates.STMoE(threshold=5.0, generator=g),
    "Hierarchical": lambda g: gates.Hierarchical(num_groups=4, noisy=True, generator=g),
}
every = pytest.mark.parametrize("name", list(STOCHASTIC))
X = tensor(40, 6)


def build(name, seed=5):
    torch.manual_seed(1)  # parameters
    return STOCHASTIC[name](torch.Generator().manual_seed(seed)).build(6, 8)


def ids(gate):
    return gate(X).expert_ids


@every
def test_the_generator_decides(name):
    one, same, other = build(name), build(name), build(name, seed=6)
    torch.manual_seed(2)
    first, second = ids(one), ids(one)
    torch.manual_seed(3)
    assert torch.equal(first, ids(same)), "the same seed, whatever torch's own generator does"
    assert torch.equal(second, ids(same))
    assert not torch.equal(first, second), "every call draws anew"
    assert not torch.equal(first, ids(other))
    state = torch.get_rng_state()
    ids(one)
    assert torch.equal(state, torch.get_rng_state()), "torch's own generator is left alone"


@every
def test_without_one_torch_decides(name):
    torch.manual_seed(1)
    gate = STOCHASTIC[name](None).build(6, 8)
    torch.manual_seed(2)
    first = ids(gate)
    torch.manual_seed(2)
    assert torch.equal(first, ids(gate))
    assert all(isinstance(value, torch.Tensor) for value in gate.state_dict().values())


@every
def test_a_resumed_run_goes_on_with_the_same_numbers(name):
    gate = build(name)
    ids(gate)
    saved = copy.deepcopy(gate.state_dict())
    expected = [ids(gate) for _ in range(3)]
    resumed = build(name, seed=99)
    resumed.load_state_dict(saved)
    assert all(torch.equal(ids(resumed), each) for each in expected)


def test_activation_checkpointing():
    """Replays torch's own generator, and cannot replay another: a clear error instead of a wrong gradient."""
    x = tensor(20, 6, grad=True)

    def run(generator):
        torch.manual_seed(1)
        layer = MoE(6, 8, 8, gate=gates.NoisyTopK(generator=generator))
        torch.manual_seed(2)
        return layer, torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).sum()

    layer, y = run(None)
    y.backward()
    checkpointed = layer.gate.noise_weight.grad.clone()
    torch.manual_seed(2)
    layer.zero_grad()
    layer(x).sum().backward()
    assert torch.equal(layer.gate.noise_weight.grad, checkpointed)
    with pytest.raises(ValueError, match="runs again inside backward"):
        run(torch.Generator())[1].backward()


def test_copies_draw_alike_and_apart():
    gate = build("Switch")
    twin = copy.deepcopy(gate)
    first = ids(gate)
    assert torch.equal(first, ids(twin))
    assert twin.draws.generator is not gate.draws.generator


def test_bad_generators():
    with pytest.raises(TypeError, match=r"generator is int, expected torch.Generator or None"):
        gates.Switch(generator=5)
    gate = build("Switch")
    with pytest.raises(ValueError, match="generator is on cpu, but its input on meta"):
        gate.to("meta")(X.to("meta"))
