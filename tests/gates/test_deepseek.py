"""DeepSeek-V2's and V3's routers against numbers worked by hand, traps included."""

import copy

import pytest
import torch
from torch import nn

from tests.cases import tensor
from tests.gates.hand import F64, log, logit, steer
from tutelx import MoE
from tutelx.gates import BiasBalanced, GroupLimited, update_biases

approx = pytest.approx
V2 = [0.30, 0.05, 0.20, 0.25, 0.15, 0.05]  # three groups of two: best 0.30, 0.25, 0.15; sums 0.35, 0.45, 0.20
V3 = [0.9, 0.1, 0.6, 0.5, 0.7, 0.2, 0.3, 0.3]  # four groups of two: sums 1.0, 1.1, 0.9, 0.6; best 0.9, 0.6, 0.7, 0.3


def test_v2_keeps_groups_by_their_best_affinity():
    gate = steer(GroupLimited(k=3, num_groups=3, kept_groups=2), 6)
    routing = gate(log(V2))
    # Groups 0 and 1; the best three inside are 0.30, 0.25, 0.20, times 16, not renormalised.
    assert routing.expert_ids.tolist() == [[0, 3, 2]]
    assert routing.weights[0].tolist() == approx([4.8, 4.0, 3.2])
    # One group: the one with 0.30, though the sum of the other is greater; its 0.05 comes before 0.25.
    routing = steer(GroupLimited(k=2, num_groups=3, kept_groups=1), 6)(log(V2))
    assert routing.expert_ids.tolist() == [[0, 1]]
    assert routing.weights[0].tolist() == approx([16 * 0.30, 16 * 0.05])
    # All groups: no limit.
    assert steer(GroupLimited(k=3, num_groups=3, kept_groups=3), 6)(log(V2)).expert_ids.tolist() == [[0, 3, 2]]


def test_equal_affinities_of_two_groups_go_to_the_lower_expert():
    # Group 1 is kept first (0.3), then group 0 (0.2); of the two 0.2, expert 0 comes before expert 3.
    gate = steer(GroupLimited(k=2, num_groups=3, kept_groups=2), 6)
    assert gate(log([0.2, 0.1, 0.3, 0.2, 0.1, 0.1])).expert_ids.tolist() == [[2, 0]]


def test_v2_losses_of_one_token():
    # K = 2, E = 6, T = 1: experts 0 and 3. f_i = 6/2 for them. balance = 3 * (0.30 + 0.25).
    config = {"balance_coef": 1.0, "device_coef": 1.0, "communication_coef": 1.0}
    gate = steer(GroupLimited(k=2, num_groups=3, kept_groups=2, **config), 6)
    routing = gate(log(V2))
    assert routing.expert_ids.tolist() == [[0, 3]]
    assert routing.aux_losses["balance"].item() == approx(3 * 0.55)
    # Devices: f' = mean = 1.5, 1.5, 0 and P' = 0.35, 0.45, 0.20.
    assert routing.aux_losses["device"].item() == approx(1.5 * 0.80)
    # Communication: D/(M T) = 3/2 for devices 0 and 1.
    assert routing.aux_losses["communication"].item() == approx(1.5 * 0.80)


def test_v3_keeps_groups_by_the_sum_of_their_best_two():
    gate = steer(BiasBalanced(k=3, num_groups=4, kept_groups=2), 8)
    routing = gate(logit(V3))
    # Groups 1 and 0 (by their best alone it would be 0 and 2): 0.9, 0.6, 0.5, over their sum 2.0, times 2.5.
    assert routing.expert_ids.tolist() == [[0, 2, 3]]
    assert routing.weights[0].tolist() == approx([2.5 * 0.45, 2.5 * 0.30, 2.5 * 0.25])


def test_v3_leaves_groups_out_even_if_all_scores_are_negative():
    # Multiplying the scores of the other groups by 0 would make them win over s - 2 < 0.
    gate = steer(BiasBalanced(k=3, num_groups=4, kept_groups=2), 8)
    gate.bias_correction.fill_(-2.0)
    routing = gate(logit(V3))
    assert routing.expert_ids.tolist() == [[0, 2, 3]]
    assert routing.weights[0].tolist() == approx([1.125, 0.75, 0.625])


def test_v3_chooses_by_the_bias_and_weighs_without_it():
    gate = steer(BiasBalanced(k=2, scale=1.0), 4)
    gate.bias_correction.copy_(torch.tensor([0.0, 0.0, 0.0, 0.75]))
    # s = 0.8, 0.5, 0.4, 0.2; with the bias expert 3 has 0.95 and comes first. Weights 0.2 and 0.8 over 1.0.
    routing = gate(logit([0.8, 0.5, 0.4, 0.2]))
    assert routing.expert_ids.tolist() == [[3, 0]]
    assert routing.weights[0].tolist() == approx([0.2, 0.8])
    # The greatest gate value of batch-prioritised routing is the unbiased one, 0.8.
    assert gate(logit([0.8, 0.5, 0.4, 0.2]), prioritized=True).priority.sigmoid().item() == approx(0.8)


def test_v3_bias_follows_the_load():
    gate = steer(BiasBalanced(k=1, gamma=0.01), 3)
    x = logit([0.9, 0.1, 0.1], [0.9, 0.1, 0.1], [0.9, 0.2, 0.1], [0.9, 0.1, 0.1], [0.1, 0.9, 0.1], [0.1, 0.9, 0.1])
    x.requires_grad_()
    gate(x)
    # Loads 4, 2, 0, mean 2: down, unchanged, up.
    assert gate.counts.tolist() == [4, 2, 0]
    gate.update_bias()
    assert gate.bias_correction.tolist() == approx([-0.01, 0.0, 0.01])
    assert gate.counts.tolist() == [0, 0, 0]
    gate.update_bias()  # no load, no change
    assert gate.bias_correction.tolist() == approx([-0.01, 0.0, 0.01])
    gate.eval()(x)
    with torch.no_grad():
        gate.train()(x)
    assert gate.counts.tolist() == [0, 0, 0], "only training calls count"


def test_v3_bias_is_no_parameter_and_stays_float32():
    gate = BiasBalanced(k=2).build(6, 4)
    assert [name for name, _ in gate.named_parameters()] == ["weight"]
    assert set(gate.state_dict()) == {"weight", "bias_correction"}
    gate.bias_correction += 0.001
    for _ in range(3):
        gate.to(torch.bfloat16)
        gate.bias_correction += 1.0
    assert gate.bias_correction.dtype == torch.float32
    assert gate.bias_correction[0].item() == approx(3.001)
    assert not gate.bias_correction.requires_grad
    meta = BiasBalanced(k=2).build(6, 4, device="meta").to_empty(device="cpu")
    assert meta.bias_correction.dtype == torch.float32


def test_v3_counts_once_under_activation_checkpointing():
    layer = MoE(6, 8, 4, gate=BiasBalanced(k=2), dtype=F64)
    x = tensor(10, 6, dtype=F64, grad=True)
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert int(layer.gate.counts.sum()) == 20


def test_update_biases_of_a_model():
    model = nn.Sequential(*(MoE(6, 8, 4, gate=BiasBalanced(k=1, gamma=0.5)) for _ in range(2)), nn.Linear(6, 6))
    model(tensor(9, 6))
    expected = [torch.sign(9 - 4 * layer.gate.counts) * 0.5 for layer in model[:2]]
    update_biases(model)
    assert all(torch.equal(layer.gate.bias_correction, each) for layer, each in zip(model, expected))
    update_biases(nn.Linear(2, 2))


def test_v3_balances_a_skewed_router():
    torch.manual_seed(0)
    gate = BiasBalanced(k=2, gamma=0.02).build(8, 8)
    x = tensor(256, 8) + 1.0  # a common direction: some experts are everybody's first choice
    gate(x)
    before = gate.counts.double().std().item()
    for _ in range(60):
        gate.update_bias()
        gate(x)
    assert gate.counts.double().std().item() < 0.3 * before
    assert torch.equal(copy.deepcopy(gate).bias_correction, gate.bias_correction)


@pytest.mark.parametrize(
    ("config", "experts", "message"),
    [
        (GroupLimited(k=2, num_groups=4, kept_groups=2), 6, "num_experts=6 is no multiple of num_groups=4"),
        (GroupLimited(k=5, num_groups=4, kept_groups=2), 8, "k=5 exceeds the 4 experts of kept_groups=2 groups"),
        (BiasBalanced(k=9), 8, "k=9 exceeds num_experts=8"),
    ],
)
def test_sizes_that_do_not_fit(config, experts, message):
    with pytest.raises(ValueError, match=message):
        config.build(4, experts)


def test_bad_settings():
    with pytest.raises(ValueError, match="kept_groups=3 exceeds num_groups=2"):
        BiasBalanced(num_groups=2, kept_groups=3)
    with pytest.raises(ValueError, match="T=10 tokens are no multiple of sequence_length=4"):
        BiasBalanced(k=2, sequence_length=4).build(6, 4)(tensor(10, 6))
    gate = BiasBalanced(k=2, num_groups=4, kept_groups=1).build(6, 8)
    with pytest.raises(ValueError, match="k=3 exceeds the 2 experts of kept_groups=1 groups"):
        gate(tensor(3, 6), top_k=3)
