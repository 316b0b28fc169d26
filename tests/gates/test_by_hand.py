"""Gates that need no capacity, against numbers worked by hand."""

import math

import pytest
import torch
from torch.nn import functional as F

from tests.cases import tensor
from tests.gates.hand import F64, fix_draws, log, steer
from tests.tolerance import assert_close
from tutelx import Capacity, MoE
from tutelx.gates import Cosine, ExpertChoice, Hierarchical, NoisyTopK, STMoE, TopK, TopP

approx = pytest.approx


def test_softmax_after_the_choice_is_the_full_softmax_renormalised():
    # p = 1/8, 2/8, 5/8: the best two over their sum are 5/7 and 2/7.
    gate = steer(TopK(k=2), 3)
    routing = gate(log([1 / 8, 2 / 8, 5 / 8]))
    assert routing.expert_ids.tolist() == [[2, 1]]
    assert routing.weights[0].tolist() == approx([5 / 7, 2 / 7])


def test_affinities_of_deepseek_moe_are_not_renormalised():
    routing = steer(TopK(k=2, normalize=False), 3)(log([1 / 8, 2 / 8, 5 / 8]))
    assert routing.weights[0].tolist() == approx([5 / 8, 2 / 8])


def test_top_any_up_to_the_dense_mixture():
    gate, x = steer(TopK(k=1), 3), log([1 / 8, 2 / 8, 5 / 8])
    assert gate(x, top_k=2).expert_ids.tolist() == [[2, 1]]
    dense = gate(x, top_k=3)
    assert dense.expert_ids.tolist() == [[2, 1, 0]]
    assert dense.weights[0].tolist() == approx([5 / 8, 2 / 8, 1 / 8])


def test_the_router_in_float32():
    # 1 + 2^-9 is no bfloat16 number: the product rounds to 1 and ties with expert 0, unless it is kept in float32.
    x = torch.tensor([[1.0, 2**-9]], dtype=torch.bfloat16)
    weight = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    for fp32, first in ((False, 0), (True, 1)):
        gate = TopK(k=1, fp32_router=fp32).build(2, 2, dtype=torch.bfloat16)
        with torch.no_grad():
            gate.weight.copy_(weight)
        routing = gate(x)
        assert routing.expert_ids.tolist() == [[first]]
        assert routing.weights.dtype == torch.float32
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert gate(x).expert_ids.tolist() == [[first]]


def test_noisy_top_k_adds_its_noise():
    gate = steer(NoisyTopK(k=2, generator=torch.Generator().manual_seed(7)), 4)
    x = tensor(5, 4, dtype=F64)
    with torch.no_grad():
        gate.noise_weight.copy_(tensor(4, 4, dtype=F64, seed=1))
    # h = x Wg + N(0, 1) * softplus(x Wn), drawn once, token by token; G is a softmax over the two best.
    noise = torch.randn(5, 4, generator=torch.Generator().manual_seed(7), dtype=F64)
    h = x + noise * F.softplus(x @ gate.noise_weight.T)
    best = h.topk(2, dim=1)
    routing = gate(x)
    assert torch.equal(routing.expert_ids, best.indices.int())
    assert_close(routing.weights, best.values.softmax(1))
    gate.eval()
    assert torch.equal(gate(x).expert_ids, x.topk(2, dim=1).indices.int())


def test_noisy_top_k_starts_even():
    gate = NoisyTopK().build(6, 4)
    assert not gate.weight.any()
    assert not gate.noise_weight.any()
    # softplus(0) = ln 2 of noise on logits of 0: every expert is somebody's.
    gate.train()
    assert gate(tensor(200, 6)).expert_ids.unique().tolist() == [0, 1, 2, 3]


def test_st_moe_sends_the_second_by_its_ratio():
    # g2/g1 = 0.3/0.5 is over 0.2: always. 0.05/0.9 = 1/18: with probability (1/18)/0.2 = 0.2777...
    x = log([0.5, 0.3, 0.2], [0.9, 0.05, 0.05], [0.9, 0.05, 0.05])
    gate = steer(STMoE(), 3)
    fix_draws(gate, [0.9999, 0.27, 0.28])
    routing = gate(x)
    assert routing.expert_ids.tolist() == [[0, 1], [0, 1], [0, -1]]
    assert routing.weights[0].tolist() == approx([0.5 / 0.8, 0.3 / 0.8])
    # Not renormalised for the token whose second expert was not sent.
    assert routing.weights[2, 0].item() == approx(0.9 / 0.95)
    always = steer(STMoE(second="always"), 3)
    assert always(x).expert_ids[2].tolist() == [0, 1]
    assert steer(STMoE(second_in_evaluation="always"), 3).eval()(x).expert_ids[2].tolist() == [0, 1]


def test_st_moe_a_second_that_is_not_sent_takes_no_place():
    # Both want expert 2 second, which has 0.75 * 2 * 2 / 3 = 1 row; token 0's draw fails, so token 1 gets it.
    layer = MoE(3, 4, 3, gate=STMoE(), capacity=Capacity.fixed(0.75), dtype=F64)
    layer.gate.load_state_dict({"weight": torch.eye(3)})
    fix_draws(layer.gate, [0.9, 0.1])
    layer(log([0.9, 0.04, 0.06], [0.04, 0.9, 0.06]))  # ratio 1/15: probability 1/3
    assert layer.stats.received_per_expert.tolist() == [1, 1, 1]


def test_st_moe_capacity_of_training_and_evaluation():
    layer = MoE(3, 4, 3, gate=STMoE(), capacity=Capacity.fixed(1.25), eval_capacity=Capacity.fixed(2.0))
    layer(tensor(12, 3))
    assert layer.stats.capacity == 10  # 1.25 * 2 * 12 / 3
    layer.eval()(tensor(12, 3))
    assert layer.stats.capacity == 16  # 2 * 2 * 12 / 3


def test_cosine_by_hand():
    # x = (3, 4) is (0.6, 0.8) normalised; the embeddings (5, 0) and (0, 2) are the axes: cosines 0.6 and 0.8, over 0.5.
    gate = Cosine(k=2, dim=2).build(2, 2, dtype=F64)
    assert gate.temperature.item() == 0.5
    with torch.no_grad():
        gate.projection.copy_(torch.eye(2))
        gate.embedding.copy_(torch.tensor([[5.0, 0.0], [0.0, 2.0]]))
    x = torch.tensor([[3.0, 4.0]], dtype=F64)
    routing = gate(x)
    assert routing.logits[0].tolist() == approx([1.2, 1.6])
    assert routing.weights[0].tolist() == approx([1 / (1 + math.exp(-0.4)), 1 / (1 + math.exp(0.4))])
    assert_close(gate(100 * x).weights, routing.weights)
    with torch.no_grad():
        gate.temperature.fill_(1e-5)  # held at 0.01
    logits = gate(x).logits
    assert logits[0].tolist() == approx([60.0, 80.0])
    (grad,) = torch.autograd.grad(logits.sum(), gate.temperature)
    assert grad.item() == approx(-1.4 / 0.01**2), "its gradient goes on, or it could never rise again"


def test_cosine_projects_to_256():
    gate = Cosine().build(12, 8)
    assert gate.projection.shape == (256, 12)
    assert gate.embedding.shape == (8, 256)


def test_experts_choose_tokens():
    # C = 1 * 4 / 2 = 2 tokens an expert. Expert 0 likes tokens 3 and 1 best, expert 1 tokens 2 and 0.
    gate = steer(ExpertChoice(k=1), 2)
    routing = gate(log([0.6, 0.4], [0.9, 0.1], [0.5, 0.5], [0.95, 0.05]))
    assert routing.expert_ids.tolist() == [[1], [0], [1], [0]]
    assert routing.weights.flatten().tolist() == approx([0.4, 0.9, 0.5, 0.95])


def test_expert_choice_rounds_up():
    # C = 1 * 3 / 2 rounded up: two tokens for each of two experts.
    routing = steer(ExpertChoice(k=1), 2)(log([0.6, 0.4], [0.9, 0.1], [0.3, 0.7]))
    assert routing.expert_ids.tolist() == [[0, 1], [0, -1], [1, -1]]
    assert routing.capacity == 2


def test_expert_choice_gives_a_token_none_to_all():
    # C = 1: expert 0 takes token 0 (0.4), expert 1 token 1 (0.37), expert 2 token 0 (0.26).
    gate = steer(ExpertChoice(k=1), 3)
    x = log([0.4, 0.34, 0.26], [0.38, 0.37, 0.25], [0.39, 0.36, 0.25])
    routing = gate(x)
    assert routing.expert_ids.tolist() == [[0, 2], [1, -1], [-1, -1]]
    assert routing.weights[:2].tolist() == [approx([0.4, 0.26]), approx([0.37, 0.0])]
    # K = E: every expert takes all tokens, which is the dense mixture.
    assert gate(x, top_k=3).expert_ids.tolist() == [[0, 1, 2]] * 3
    # Of equal tokens the earlier one is taken.
    assert gate(0 * x).expert_ids.tolist() == [[0, 1, 2], [-1, -1, -1], [-1, -1, -1]]


def test_expert_choice_never_overflows_and_takes_the_capacity_of_a_call():
    layer = MoE(4, 8, 4, gate=ExpertChoice(k=2), dtype=F64)
    x = tensor(10, 4, dtype=F64)
    layer(x)  # C = 2 * 10 / 4 = 5
    assert layer.stats.received_per_expert.tolist() == [5, 5, 5, 5]
    assert layer.stats.dropped == 0
    layer(x, capacity=Capacity.fixed(0.5))  # ceil(0.5 * 5)
    assert layer.stats.received_per_expert.tolist() == [3, 3, 3, 3]
    layer(x, capacity=Capacity.fixed(9.0))  # never more than there are tokens
    assert layer.stats.received_per_expert.tolist() == [10, 10, 10, 10]


@pytest.mark.parametrize(
    ("p", "k", "taken"), [(0.5, None, 1), (0.6, None, 2), (0.8, None, 2), (0.82, None, 3), (1.0, None, 3), (0.82, 2, 2)]
)
def test_top_p_takes_the_smallest_set_that_reaches_p(p, k, taken):
    # Probabilities 1/2, 5/16, 3/16 add up exactly: 0.5, 0.8125, 1.
    routing = steer(TopP(p=p, k=k), 3)(log([5 / 16, 1 / 2, 3 / 16]))
    ids = [i for i in routing.expert_ids[0].tolist() if i >= 0]
    assert ids == [1, 0, 2][:taken]
    assert routing.weights[0][:taken].tolist() == approx([1 / 2, 5 / 16, 3 / 16][:taken])
    assert not routing.weights[0][taken:].any()


def test_top_p_counts_differ_by_token():
    routing = steer(TopP(p=0.7, normalize=True), 3)(log([0.9, 0.06, 0.04], [0.4, 0.35, 0.25]))
    assert routing.expert_ids.tolist() == [[0, -1, -1], [0, 1, -1]]
    assert routing.weights.tolist() == [approx([1, 0, 0]), approx([0.4 / 0.75, 0.35 / 0.75, 0])]


def test_hierarchical_by_hand():
    # Gp = (0.8, 0.2); inside group 0 (0.75, 0.25), inside group 1 (0.5, 0.5): products 0.6, 0.2, 0.1, 0.1.
    gate = Hierarchical(num_groups=2, kept_groups=2, k_inside=2).build(6, 4, dtype=F64)
    with torch.no_grad():
        gate.group_weight.copy_(torch.eye(6)[:2])
        gate.weight.copy_(torch.eye(6)[2:])
    x = log([0.8, 0.2, 0.75, 0.25, 0.5, 0.5])
    routing = gate(x)
    assert routing.expert_ids.tolist() == [[0, 1, 2, 3]]
    assert routing.weights[0].tolist() == approx([0.6, 0.2, 0.1, 0.1])
    # Two experts are one in each of two groups: G_ij is 1 then.
    two = gate(x, top_k=2)
    assert two.expert_ids.tolist() == [[0, 2]]
    assert two.weights[0].tolist() == approx([0.8, 0.2])
    assert gate(x, top_k=1).expert_ids.tolist() == [[0]]
    with pytest.raises(ValueError, match="top_k=3 cannot be spread evenly over 2 groups of 2 experts"):
        gate(x, top_k=3)
    with pytest.raises(ValueError, match="top_k=5 exceeds num_experts=4"):
        gate(x, top_k=5)


def test_hierarchical_with_one_group_is_the_flat_gate():
    gate = Hierarchical(num_groups=1, kept_groups=1, k_inside=3).build(8, 5, dtype=F64)
    flat = TopK(k=3).build(8, 5, dtype=F64)
    flat.load_state_dict({"weight": gate.weight.detach()})
    x = tensor(9, 8, dtype=F64)
    assert torch.equal(gate(x).expert_ids, flat(x).expert_ids)
    assert_close(gate(x).weights, flat(x).weights)


def test_hierarchical_noise():
    config = Hierarchical(num_groups=2, kept_groups=1, k_inside=1, noisy=True, importance_coef=0.0)
    gate = config.build(8, 4, dtype=F64)
    x = tensor(50, 8, dtype=F64)
    assert not torch.equal(gate(x).expert_ids, gate(x).expert_ids)
    gate.eval()
    assert torch.equal(gate(x).expert_ids, gate(x).expert_ids)
