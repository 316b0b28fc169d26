"""GShard and Switch, whose definitions say what happens at a full expert, against numbers worked by hand."""

import pytest
import torch

from tests.cases import tensor
from tests.gates.hand import F64, fix_draws, log, steer
from tutelx import Capacity, MoE
from tutelx.gates import GShardTop2, Switch

approx = pytest.approx
ALWAYS = {"second": "always"}


def test_gshard_weights_and_chance():
    # g = 0.5/0.8, 0.3/0.8: sent if 0.75 > U. Nothing is renormalised when it is not.
    x = log([0.5, 0.3, 0.2], [0.5, 0.3, 0.2])
    gate = steer(GShardTop2(), 3)
    fix_draws(gate, [0.7499, 0.7501])
    routing = gate(x)
    assert routing.expert_ids.tolist() == [[0, 1], [0, -1]]
    assert routing.weights[1, 0].item() == approx(0.625)
    gate.eval()  # the paper's rule holds in evaluation too
    assert gate(x).expert_ids.tolist() == [[0, 1], [0, -1]]
    assert steer(GShardTop2(**ALWAYS), 3)(x).expert_ids.tolist() == [[0, 1], [0, 1]]


def test_gshard_first_choices_come_first():
    # One row an expert (0.5 * 2 * 2 / 2). Token 0's second choice is expert 1, which token 1 chose first.
    routing = steer(GShardTop2(**ALWAYS), 2)(
        log([0.6, 0.4], [0.1, 0.9]), capacity=Capacity.fixed(0.5), prioritized=False
    )
    assert routing.expert_ids.tolist() == [[0, -1], [1, -1]]
    assert routing.requested.tolist() == [2, 2]


@pytest.mark.parametrize(
    ("draws", "ids", "requested"),
    [
        # Both second choices are expert 2 with 2*g2 = 8/9; it has one row (0.75 * 2 * 2 / 3). Token 0 takes it,
        ([0.1, 0.1], [[0, 2], [1, -1]], [1, 1, 2]),
        # and where token 0's draw fails its counter has advanced all the same: token 1 finds no room.
        ([0.95, 0.1], [[0, -1], [1, -1]], [1, 1, 1]),
    ],
)
def test_gshard_counters_advance_for_a_choice_that_is_not_sent(draws, ids, requested):
    layer = MoE(3, 4, 3, gate=GShardTop2(), capacity=Capacity.fixed(0.75), dtype=F64)
    layer.gate.load_state_dict({"weight": torch.eye(3)})
    fix_draws(layer.gate, draws)
    x = log([0.5, 0.1, 0.4], [0.1, 0.5, 0.4])
    routing = layer.gate(x, capacity=layer.capacity)
    assert routing.expert_ids.tolist() == ids
    assert routing.requested.tolist() == requested
    layer(x)
    assert layer.stats.tokens_per_expert.tolist() == requested
    assert int(layer.stats.received_per_expert.sum()) == sum(i >= 0 for row in ids for i in row)
    assert layer.stats.dropped == 1


def test_gshard_groups_have_a_capacity_of_their_own():
    # All want expert 0 first. Groups of two: one row each (0.5 * 2 * 2 / 2), so tokens 0 and 2. One group: 0 and 1.
    x = log(*[[0.9, 0.1]] * 4)
    for size, kept in ((2, [True, False, True, False]), (None, [True, True, False, False])):
        routing = steer(GShardTop2(group_size=size, **ALWAYS), 2)(x, capacity=Capacity.fixed(0.5))
        assert (routing.expert_ids[:, 0] >= 0).tolist() == kept
        assert routing.capacity == 2
    # A last group of one token has the room of a whole group.
    routing = steer(GShardTop2(group_size=2, **ALWAYS), 2)(x[:3], capacity=Capacity.fixed(0.5))
    assert (routing.expert_ids[:, 0] >= 0).tolist() == [True, False, True]


def test_gshard_batch_prioritised_inside_its_groups():
    x = log([0.6, 0.4], [0.9, 0.1], [0.8, 0.2], [0.7, 0.3])
    gate = steer(GShardTop2(group_size=2, **ALWAYS), 2)
    routing = gate(x, capacity=Capacity.fixed(0.5), prioritized=True)
    assert (routing.expert_ids[:, 0] >= 0).tolist() == [False, True, True, False]


def test_gshard_loss_is_the_mean_over_groups():
    # Group 1: c = (2, 0), m = (0.75, 0.25): 1/2 * (2/2) * 0.75 = 0.375. Group 2: c = (1, 1), m = (0.5, 0.5): 0.25.
    x = log([0.9, 0.1], [0.6, 0.4], [0.8, 0.2], [0.2, 0.8])
    aux = steer(GShardTop2(group_size=2, balance_coef=1.0), 2)(x).aux_losses
    assert aux["balance"].item() == approx((0.375 + 0.25) / 2)
    # One group: c = (3, 1)/4, m = (0.625, 0.375): 1/2 * (0.46875 + 0.09375).
    aux = steer(GShardTop2(balance_coef=1.0), 2)(x).aux_losses
    assert aux["balance"].item() == approx(0.28125)


def test_switch_weight_is_the_raw_probability():
    routing = steer(Switch(jitter=0.0), 3)(log([0.5, 0.3, 0.2], [0.2, 0.2, 0.6]))
    assert routing.expert_ids.tolist() == [[0], [2]]
    assert routing.weights.flatten().tolist() == approx([0.5, 0.6])


def test_switch_keeps_exactly_the_capacity():
    # A 1-based count with < would keep 1 * 6 / 2 - 1 = 2.
    layer = MoE(2, 4, 2, gate=Switch(jitter=0.0), capacity=Capacity.fixed(1.0), dtype=F64)
    layer.gate.load_state_dict({"weight": torch.eye(2)})
    y = layer(log(*[[0.9, 0.1]] * 6))
    assert (y.abs().sum(1) > 0).tolist() == [True, True, True, False, False, False]
    assert layer.stats.dropped == 3


def test_switch_no_token_left_behind():
    # One row an expert (1 * 3 / 3): each token takes the best expert that is left, with that expert's probability.
    x = log(*[[0.5, 0.3, 0.2]] * 3)
    fixed = {"capacity": Capacity.fixed(1.0)}
    routing = steer(Switch(jitter=0.0, reroute=2), 3)(x, **fixed)
    assert routing.expert_ids.flatten().tolist() == [0, 1, 2]
    assert routing.weights.flatten().tolist() == approx([0.5, 0.3, 0.2])
    assert routing.requested.tolist() == [3, 0, 0]
    # One more try is not enough for token 2.
    assert steer(Switch(jitter=0.0, reroute=1), 3)(x, **fixed).expert_ids.flatten().tolist() == [0, 1, -1]
    # A token that is rerouted never displaces one that is there already: expert 1 is token 2's.
    x = log([0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.3, 0.5, 0.2])
    assert steer(Switch(jitter=0.0, reroute=2), 3)(x, **fixed).expert_ids.flatten().tolist() == [0, 2, 1]
    # Without a limit nothing is rerouted.
    assert steer(Switch(jitter=0.0, reroute=2), 3)(x).expert_ids.flatten().tolist() == [0, 0, 1]


def test_rerouting_of_several_choices_and_by_priority():
    # K = 2, two rows an expert (1 * 2 * 4 / 4), all tokens alike: 0 and 1 get experts 0 and 1, the others 2 and 3.
    x = log(*[[0.4, 0.3, 0.2, 0.1]] * 4)
    gate = steer(Switch(k=2, jitter=0.0, reroute=3), 4)
    ids = gate(x, capacity=Capacity.fixed(1.0)).expert_ids
    assert [sorted(row) for row in ids.tolist()] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    x = log([0.5, 0.3, 0.2], [0.7, 0.2, 0.1], [0.6, 0.3, 0.1])
    gate = steer(Switch(jitter=0.0, reroute=2), 3)
    routing = gate(x, capacity=Capacity.fixed(1.0), prioritized=True)
    assert routing.expert_ids.flatten().tolist() == [2, 0, 1]


@pytest.mark.parametrize("experts", [2, 5, 8])
def test_with_room_for_all_nothing_is_left_behind(experts):
    gate = Switch(reroute=experts).build(6, experts, dtype=F64)
    routing = gate(tensor(4 * experts, 6, dtype=F64), capacity=Capacity.fixed(1.0))
    assert torch.bincount(routing.expert_ids.flatten(), minlength=experts).tolist() == [4] * experts


def test_switch_jitter_is_multiplicative_and_in_training_only():
    gate = steer(Switch(jitter=0.25), 4)
    x = tensor(500, 4, dtype=F64)
    ratio = gate(x).logits / x
    assert 0.75 <= ratio.min().item() < 0.76
    assert 1.24 < ratio.max().item() <= 1.25
    gate.eval()
    assert torch.equal(gate(x).logits, x)
    assert Switch().jitter == 0.01


def test_switch_computes_in_float32_and_sends_the_input_dtype():
    layer = MoE(8, 16, 4, gate=Switch(), dtype=torch.bfloat16)
    x = tensor(6, 8, dtype=torch.bfloat16)
    routing = layer.gate.eval()(x)
    assert routing.logits.dtype == torch.float32
    assert torch.equal(routing.logits, x.float() @ layer.gate.weight.float().T)
    assert layer(x).dtype == torch.bfloat16
    layer.gate.train()
    assert layer.gate(x).logits.dtype == torch.float32


def test_switch_starts_small():
    # std = sqrt(0.1 / 1000) = 0.01, cut at twice that; a normal cut there has 0.8796 of its deviation.
    weight = Switch().build(1000, 200).weight
    assert weight.abs().max().item() <= 0.02
    assert weight.std().item() == approx(0.008796, rel=0.01)
