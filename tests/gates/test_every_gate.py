"""What holds for every gate: ties, permutations, corners of E and K, numbers that cannot be compared, low precision,
gradients, and that the layer computes what the routing says."""

import copy
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cases import tensor
from tests.gates.hand import F64
from tests.tolerance import assert_close
from tutelx import Capacity, MoE, gates

T, M, E = 9, 6, 8
# With chance left out, a gate is a function of its input.
SURE = {"second": "always", "second_in_evaluation": "always"}
GATES = {
    "TopK": gates.TopK(z_coef=0.1),
    "TopK raw": gates.TopK(k=3, normalize=False),
    "TopK sigmoid": gates.TopK(score="sigmoid"),
    "NoisyTopK": gates.NoisyTopK(),
    "GShardTop2": gates.GShardTop2(**SURE),
    "GShardTop2 groups": gates.GShardTop2(group_size=4, **SURE),
    "Switch": gates.Switch(jitter=0.0, z_coef=0.1),
    "Switch reroute": gates.Switch(jitter=0.0, reroute=3),
    "STMoE": gates.STMoE(**SURE),
    "Cosine": gates.Cosine(dim=5),
    "ExpertChoice": gates.ExpertChoice(),
    "GroupLimited": gates.GroupLimited(k=3, num_groups=4, kept_groups=2),
    "BiasBalanced": gates.BiasBalanced(k=3, num_groups=4, kept_groups=2, sequence_coef=0.1),
    "TopP": gates.TopP(p=0.6, k=5),
    "Hierarchical": gates.Hierarchical(num_groups=4),
}
ALONE = {  # for one expert
    "TopP": gates.TopP(),
    "TopK": gates.TopK(k=1),
    "TopK sigmoid": gates.TopK(k=1, score="sigmoid"),
    "NoisyTopK": gates.NoisyTopK(k=1),
    "Switch": gates.Switch(jitter=0.0),
    "Cosine": gates.Cosine(k=1, dim=5),
    "ExpertChoice": gates.ExpertChoice(k=1),
    "GroupLimited": gates.GroupLimited(k=1, num_groups=1, kept_groups=1),
    "BiasBalanced": gates.BiasBalanced(k=1),
    "Hierarchical": gates.Hierarchical(num_groups=1, kept_groups=1, k_inside=1),
}
every = pytest.mark.parametrize("name", list(GATES))


def build(name, *, dtype=F64, config=None, experts=E):
    """In evaluation mode, with parameters of unit scale whatever the gate starts with."""
    gate = (config or GATES[name]).build(M, experts, dtype=dtype)
    with torch.no_grad():
        for i, parameter in enumerate(gate.parameters()):
            if parameter.numel() > 1:
                parameter.copy_(tensor(*parameter.shape, seed=20 + i))
    return gate.eval()


def by_expert(routing, experts=E):
    """[T, E] weights: a form that does not depend on the order of choices."""
    dense = torch.zeros(routing.expert_ids.shape[0], experts + 1, dtype=routing.weights.dtype)
    return dense.scatter_add(1, routing.expert_ids.long() % (experts + 1), routing.weights)[:, :experts]


@every
def test_a_permutation_of_tokens_permutes_the_routing(name):
    gate, x = build(name), tensor(T, M, dtype=F64)
    order = torch.randperm(T, generator=torch.Generator().manual_seed(3))
    assert_close(by_expert(gate(x[order])), by_expert(gate(x))[order])


@every
def test_ids_are_distinct_and_weights_belong_to_them(name):
    routing = build(name)(tensor(T, M, dtype=F64))
    assert routing.expert_ids.dtype == torch.int32
    assert routing.weights.shape == routing.expert_ids.shape
    for row in routing.expert_ids.tolist():
        used = [i for i in row if i >= 0]
        assert len(set(used)) == len(used)
        assert all(0 <= i < E for i in used)
    assert (routing.weights >= 0).all()


@every
def test_the_layer_computes_what_the_routing_says(name):
    layer = MoE(M, 10, E, gate=build(name), dtype=F64)
    layer.eval()
    x = tensor(T, M, dtype=F64)
    weights_TE = by_expert(layer.gate(x, capacity=layer.capacity))
    expected = torch.zeros_like(x)
    e = layer.experts
    for i in range(E):
        hidden = torch.nn.functional.silu(x @ e.gate_proj[i].T) * (x @ e.up_proj[i].T)
        expected += weights_TE[:, i : i + 1] * (hidden @ e.down_proj[i].T)
    assert_close(layer(x), expected)


@every
def test_equal_logits_take_the_lowest_experts(name):
    gate = build(name)
    if name == "ExpertChoice":
        return  # ties are between tokens there: test_by_hand
    with torch.no_grad():
        for parameter in gate.parameters():
            if parameter.numel() > 1:
                parameter.zero_()
    routing = gate(tensor(3, M, dtype=F64))
    used = [[i for i in row if i >= 0] for row in routing.expert_ids.tolist()]
    # One expert in each of two groups of two, two inside: 0, 1, 2, 3 all the same.
    assert used == [list(range(len(used[0])))] * 3


@every
@pytest.mark.parametrize("shift", [-1000.0, 0.0, 50.0])
def test_a_shift_of_all_logits(name, shift):
    """Softmax does not see it; a sigmoid may underflow to weights of 0, and nothing is NaN."""
    gate = build(name)
    if name == "Cosine":
        return  # cosines cannot be shifted
    x = torch.cat([tensor(T, M - 1, dtype=F64), torch.ones(T, 1, dtype=F64)], dim=1)
    before = gate(x)
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter[:, -1] += shift
    after = gate(x)
    assert after.weights.isfinite().all()
    if name not in ("TopK sigmoid", "BiasBalanced"):
        assert_close(by_expert(after), by_expert(before))
    elif shift < 0:
        assert not after.weights.any()


@every
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_cannot_be_compared_is_an_error(name, value):
    x = tensor(T, M, dtype=F64)
    x[5, 2] = value
    with pytest.raises(ValueError, match=r"logits\["):
        build(name)(x)


@every
def test_infinite_logits(name):
    """An expert at -inf is chosen by nobody; a token without a finite logit is an error."""
    gate = build(name)
    if name in ("Cosine", "Hierarchical", "ExpertChoice"):
        return  # no logit of a linear router; two kinds of logits; an expert that must take tokens
    logits = tensor(T, E, dtype=F64)
    logits[:, 3] = -math.inf
    gate.logits = lambda x: logits
    routing = gate(tensor(T, M, dtype=F64), capacity=Capacity.dropless())
    assert not (routing.expert_ids == 3).any() or not routing.weights[routing.expert_ids == 3].any()
    assert routing.weights.isfinite().all()
    logits[4] = -math.inf
    with pytest.raises(ValueError, match=r"logits\[4\]"):
        gate(tensor(T, M, dtype=F64))


@every
def test_low_precision_input(name):
    layer = MoE(M, 10, E, gate=build(name, dtype=torch.bfloat16), dtype=torch.bfloat16)
    x = tensor(T, M, dtype=torch.bfloat16, grad=True)
    y = layer(x)
    assert y.dtype == torch.bfloat16
    assert y.isfinite().all()
    routing = layer.gate(x)
    assert routing.weights.dtype == torch.float32
    (y.float().sum() + layer.aux_loss).backward()
    assert x.grad.isfinite().all()


@every
def test_gradients(name):
    gate = build(name).train()
    x = tensor(T, M, dtype=F64, grad=True)
    # Noise is drawn anew on every call: the same each time.
    if name == "NoisyTopK":
        gate.draws.normal = lambda shape, like: tensor(*shape, dtype=F64, seed=9)

    def outputs(x, *parameters):
        routing = gate(x)
        return routing.weights, *routing.aux_losses.values()

    assert torch.autograd.gradcheck(outputs, (x, *gate.parameters()), eps=1e-7, atol=1e-5)


@every
def test_the_layer_takes_every_setting(name):
    for prioritized in (False, True):
        layer = MoE(M, 10, E, gate=build(name), capacity=Capacity.fixed(0.5), batch_prioritized=prioritized, dtype=F64)
        twin = copy.deepcopy(layer)
        x = tensor(12, M, dtype=F64)
        assert torch.equal(layer(x), twin(x))
        assert layer.stats.received.max_over_mean >= 1
        for top_k in (1, 2, 4):
            assert layer(x, top_k=top_k, capacity=Capacity.bounded(1.0)).isfinite().all()
        assert layer(x[:0]).shape == (0, M)
        with pytest.raises(ValueError, match="top_k"):
            layer(x, top_k=0)
        with pytest.raises(ValueError, match=r"=9 exceeds num_experts=8"):
            layer(x, top_k=9)


@pytest.mark.parametrize("name", list(ALONE))
def test_one_expert(name):
    gate = build(name, config=ALONE[name], experts=1)
    routing = gate(tensor(T, M, dtype=F64))
    assert routing.expert_ids.tolist() == [[0]] * T
    wanted = {"GroupLimited": 16.0, "BiasBalanced": 2.5}.get(name, 1.0)
    assert routing.weights.flatten().tolist() == pytest.approx([wanted] * T)
    assert gate.train()(tensor(T, M, dtype=F64)).expert_ids.tolist() == [[0]] * T


@pytest.mark.parametrize("config", [gates.GShardTop2(), gates.STMoE()], ids=str)
def test_top_2_needs_two_experts(config):
    with pytest.raises(ValueError, match="k=2 exceeds num_experts=1"):
        config.build(M, 1)


@pytest.mark.parametrize(
    "name", ["TopK", "NoisyTopK", "GShardTop2", "Switch", "STMoE", "Cosine", "ExpertChoice", "TopP"]
)
def test_all_experts_are_the_dense_softmax_mixture(name):
    config = gates.TopP(p=1.0) if name == "TopP" else None
    gate, x = build(name, config=config), tensor(T, M, dtype=F64)
    routing = gate(x, top_k=E)
    assert_close(by_expert(routing), routing.logits.to(F64).softmax(1))


@settings(max_examples=15)
@given(scale=st.floats(0.01, 100), name=st.sampled_from([n for n in GATES if n not in ("TopP", "ExpertChoice")]))
def test_choices_ignore_a_positive_scale(scale, name):
    gate, x = build(name), tensor(T, M, dtype=F64)
    before = gate(x)
    if name == "GShardTop2":
        before = gate(x, capacity=Capacity.fixed(1.0))
        assert torch.equal(gate(scale * x, capacity=Capacity.fixed(1.0)).expert_ids, before.expert_ids)
        return
    after = gate(scale * x)
    ids = [routing.expert_ids.sort(1).values for routing in (before, after)]
    if name not in ("Hierarchical", "BiasBalanced"):  # products, and sums of scores, of two gates: not ordered alike
        assert torch.equal(*ids)
    if name == "Cosine":
        assert_close(after.weights, before.weights)


@settings(max_examples=15)
@given(data=st.data(), name=st.sampled_from(list(GATES)))
def test_small_integers_tie_everywhere(data, name):
    """Any logits of many ties give a routing, twice the same, that the layer can run at any capacity."""
    gate = build(name)
    values = data.draw(st.lists(st.integers(-1, 1), min_size=M * 4, max_size=M * 4))
    x = torch.tensor(values, dtype=F64).view(4, M)
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.copy_(parameter.round().clamp(-1, 1) if parameter.numel() > 1 else parameter)
    layer = MoE(M, 4, E, gate=gate, dtype=F64)
    factor = data.draw(st.sampled_from([0.3, 1.0, 4.0]))
    one, other = (layer(x, capacity=Capacity.fixed(factor)) for _ in range(2))
    assert torch.equal(one, other)
    assert one.isfinite().all()
    assert int(layer.stats.received_per_expert.max()) <= layer.stats.capacity


def test_the_readme_names_every_gate():
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    configs = [name for name in gates.__all__ if hasattr(getattr(gates, name), "build")]
    assert len(configs) == 12, configs  # GateConfig, the protocol, among them
    assert [name for name in configs if name != "GateConfig" and f"| `{name}` |" not in readme] == []
