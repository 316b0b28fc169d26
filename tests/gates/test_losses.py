"""The balance losses against numbers worked by hand, their traps, and what holds for all of them."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.cases import tensor
from tests.gates.hand import F64
from tests.tolerance import assert_close
from tutelx import ops
from tutelx.gates import losses

approx = pytest.approx
IDS = torch.tensor([[0], [0], [1], [0]]).int()  # shares of first choices: 3/4, 1/4
SUM = torch.tensor([2.4, 1.6], dtype=F64)  # over four tokens: mean 0.6, 0.4


def test_importance_by_hand():
    # Sums of weights 0.75 + 0.5 = 1.25 and 0.25 + 0.5 = 0.75: mean 1, variance 0.0625 (0.125 over E - 1).
    ids = torch.tensor([[0, 1], [1, 0]]).int()
    weights = torch.tensor([[0.75, 0.25], [0.5, 0.5]], dtype=F64)
    assert losses.importance(ids, weights, 2).item() == approx(0.0625)
    assert losses.importance(ids, weights, 2, unbiased=True).item() == approx(0.125)
    # Three experts, the third unused: sums 1.25, 0.75, 0; mean 2/3, variance 2.125/3 - 4/9 = 0.263888...
    assert losses.importance(ids, weights, 3).item() == approx((2.125 / 3 - 4 / 9) / (4 / 9))


def phi(z):
    return 0.5 * (1 + math.erf(z / math.sqrt(2)))


def test_load_excludes_the_expert_itself():
    # K = 2 of three: noisy (3, 2, 1). Expert 0 and 1 are in; without them the 2nd best is 1. Expert 2 is out: 2.
    # Taking the 2nd best of all, which is 2, for everybody would give Phi(0) for expert 1.
    clean = torch.tensor([[2.5, 1.5, 1.0]], dtype=F64)
    noisy = torch.tensor([[3.0, 2.0, 1.0]], dtype=F64)
    std = torch.tensor([[1.0, 0.5, 2.0]], dtype=F64)
    expected = [phi(1.5), phi(0.5 / 0.5), phi(-1.0 / 2.0)]
    assert losses.smooth_load(clean, noisy, std, 2).tolist() == approx(expected)
    mean = sum(expected) / 3
    variance = sum((p - mean) ** 2 for p in expected) / 3
    assert losses.load(clean, noisy, std, 2).item() == approx(variance / mean**2)


def test_load_with_ties_and_with_all_experts():
    # (2, 1, 1): of two equal logits one is in, one out; without either the 2nd best is 1.
    noisy = torch.tensor([[2.0, 1.0, 1.0]], dtype=F64)
    load = losses.smooth_load(noisy, noisy, torch.ones(1, 3, dtype=F64), 2)
    assert load.tolist() == approx([phi(1.0), 0.5, 0.5])
    assert losses.smooth_load(noisy, noisy, torch.ones(1, 3), 3).tolist() == [1.0, 1.0, 1.0]
    assert losses.load(noisy, noisy, torch.ones(1, 3), 3).item() == 0


def test_load_is_the_chance_to_stay():
    """Redraw one expert's own noise many times: how often is it among the K best?"""
    generator = torch.Generator().manual_seed(0)
    clean, noise = tensor(1, 5, dtype=F64, seed=1), tensor(1, 5, dtype=F64, seed=2)
    std = torch.full((1, 5), 0.8, dtype=F64)
    chance = losses.smooth_load(clean, clean + std * noise, std, 2)
    for i in range(5):
        h = (clean + std * noise).repeat(20000, 1)
        h[:, i] = clean[0, i] + 0.8 * torch.randn(20000, generator=generator, dtype=F64)
        stays = (h.topk(2, dim=1).indices == i).any(1).double().mean()
        assert stays.item() == approx(chance[i].item(), abs=0.015)


def test_switch_and_gshard_by_hand():
    # 2 * (0.75 * 0.6 + 0.25 * 0.4) = 1.1; swapping f and P gives the same number but no gradient to P, see below.
    assert losses.switch_balance(IDS, SUM).item() == approx(1.1)
    # 1/2 * (0.75 * 0.6 + 0.25 * 0.4) = 0.275
    assert losses.gshard_balance(IDS, SUM).item() == approx(0.275)


@pytest.mark.parametrize("experts", [1, 2, 4, 7])
def test_uniform_routing(experts):
    """Switch's form gives 1, GShard's 1/E^2: the conversion is E^2."""
    ids = torch.arange(2 * experts).remainder(experts).unsqueeze(1)
    score_sum = torch.full((experts,), 2.0, dtype=F64)
    assert losses.switch_balance(ids, score_sum).item() == approx(1)
    assert losses.gshard_balance(ids, score_sum).item() == approx(1 / experts**2)
    assert losses.expert_balance(ids, score_sum).item() == approx(1)
    scores = torch.full((2 * experts, experts), 1 / experts, dtype=F64)
    assert losses.sequence_balance(ids, scores).item() == approx(1)


def test_the_gradient_goes_to_the_probabilities():
    # dL/dP_i = E * f_i, and P_i = SUM_i / 4: (2 * 0.75 / 4, 2 * 0.25 / 4).
    score_sum = SUM.clone().requires_grad_()
    losses.switch_balance(IDS, score_sum).backward()
    assert score_sum.grad.tolist() == approx([0.375, 0.125])


def test_router_z_by_hand():
    # logsumexp of (0, 0) is ln 2, of (ln 3, 0) is ln 4: the mean of their squares.
    lse = ops.gate(torch.tensor([[0.0, 0.0], [math.log(3), 0.0]], dtype=F64), 1).logsumexp
    assert losses.router_z(lse).item() == approx((math.log(2) ** 2 + math.log(4) ** 2) / 2)


# E = 4, K = 2, T = 2, two devices of two: token 0 to experts 0 and 1, token 1 to 0 and 2.
TWO = torch.tensor([[0, 1], [0, 2]]).int()
P4 = torch.tensor([0.8, 0.6, 0.4, 0.2], dtype=F64)  # sums over two tokens: means 0.4, 0.3, 0.2, 0.1


def test_deepseek_expert_balance_by_hand():
    # f = 4/(2*2) * (2, 1, 1, 0); f . P = 0.8 + 0.3 + 0.2.
    assert losses.expert_balance(TWO, P4).item() == approx(1.3)


def test_deepseek_device_balance_by_hand():
    # f' = (1.5, 0.5) the mean, P' = (0.7, 0.3) the sum.
    assert losses.device_balance(TWO, P4, 2).item() == approx(1.5 * 0.7 + 0.5 * 0.3)


def test_deepseek_communication_balance_by_hand():
    # Device 0 gets both tokens (token 0 once, though it has two experts there), device 1 one: f'' = 2/(M*2) * (2, 1).
    assert losses.communication_balance(TWO, P4, 2, device_limit=1).item() == approx(2 * 0.7 + 1 * 0.3)
    assert losses.communication_balance(TWO, P4, 2, device_limit=2).item() == approx(1 * 0.7 + 0.5 * 0.3)


def test_deepseek_sequence_balance_by_hand():
    # Sequence 0 (one token): experts 0, f = 2/1 * (1, 0); s = (0.9, 0.3) is (0.75, 0.25): 2 * 0.75.
    # Sequence 1: expert 1; s = (0.2, 0.8): 2 * 0.8. Mean 1.55. As one sequence: f = (1, 1): 1.
    ids, scores = torch.tensor([[0], [1]]), torch.tensor([[0.9, 0.3], [0.2, 0.8]], dtype=F64)
    assert losses.sequence_balance(ids, scores, 1).item() == approx(1.55)
    assert losses.sequence_balance(ids, scores, 2).item() == approx(1.0)
    assert losses.sequence_balance(ids, scores).item() == approx(1.0)


def textbook(ids, scores, device_limit=2):
    """Every loss from one-hot masks of all tokens, in loops and float64."""
    (T, K), E, D = ids.shape, scores.shape[1], 2
    mask = torch.zeros(T, K, E, dtype=F64)
    for t in range(T):
        for k in range(K):
            if ids[t, k] >= 0:
                mask[t, k, ids[t, k]] = 1
    P = scores.sum(0) / T
    first = mask[:, 0].sum(0) / T
    f = mask.sum((0, 1)) * E / (K * T)
    device = mask.sum(1).view(T, D, E // D).sum(2)
    sent = (device > 0).double().sum(0) * D / (device_limit * T)
    return {
        "switch": E * (first * P).sum(),
        "gshard": (first * P).sum() / E,
        "expert": (f * P).sum(),
        "device": (f.view(D, -1).mean(1) * P.view(D, -1).sum(1)).sum(),
        "communication": (sent * P.view(D, -1).sum(1)).sum(),
        "sequence": (f * (scores / scores.sum(1, keepdim=True)).mean(0)).sum(),
    }


def ours(ids, scores):
    total = scores.sum(0)
    return {
        "switch": losses.switch_balance(ids, total),
        "gshard": losses.gshard_balance(ids, total),
        "expert": losses.expert_balance(ids, total),
        "device": losses.device_balance(ids, total, 2),
        "communication": losses.communication_balance(ids, total, 2, 2),
        "sequence": losses.sequence_balance(ids, scores),
    }


@given(
    tokens=st.integers(1, 12), top_k=st.integers(1, 4), unused=st.sampled_from([0.0, 0.3, 1.0]), seed=st.integers(0, 99)
)
def test_equal_to_one_hot_masks(tokens, top_k, unused, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand((tokens, 4), generator=generator, dtype=F64) + 0.01
    ids = torch.rand((tokens, 4), generator=generator).argsort(1)[:, :top_k].int()
    ids[torch.rand(ids.shape, generator=generator) < unused] = -1
    order = torch.randperm(tokens, generator=generator)
    expected = textbook(ids, scores)
    for name, value in ours(ids, scores).items():
        assert value.item() == approx(expected[name].item(), abs=1e-12), name
        assert ours(ids[order], scores[order])[name].item() == approx(value.item(), abs=1e-12), name


@given(scale=st.floats(0.01, 100), seed=st.integers(0, 20))
def test_importance_ignores_scale_and_order(scale, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand((6, 5), generator=generator).argsort(1)[:, :3].int()
    weights = torch.rand((6, 3), generator=generator, dtype=F64)
    value = losses.importance(ids, weights, 5).item()
    assert losses.importance(ids, scale * weights, 5).item() == approx(value)
    assert losses.importance(ids.flip(0), weights.flip(0), 5).item() == approx(value)
    dense = torch.zeros(6, 5, dtype=F64).scatter(1, ids.long(), weights).sum(0)
    assert value == approx((dense.var(correction=0) / dense.mean() ** 2).item())


def test_gradients():
    ids = TWO
    weights, scores = tensor(2, 2, dtype=F64, grad=True), tensor(2, 4, dtype=F64, seed=1).sigmoid().requires_grad_()
    clean, noisy = tensor(3, 4, dtype=F64, seed=2, grad=True), tensor(3, 4, dtype=F64, seed=3, grad=True)
    std = (tensor(3, 4, dtype=F64, seed=4).abs() + 0.1).requires_grad_()
    check = torch.autograd.gradcheck
    assert check(lambda w: losses.importance(ids, w, 4), weights)
    assert check(lambda c, n, s: losses.load(c, n, s, 2), (clean, noisy, std))
    assert check(lambda s: tuple(ours(ids, s).values()), scores)
    assert check(losses.router_z, tensor(4, dtype=F64, grad=True))


def test_an_empty_batch_gives_zero():
    ids, scores = torch.zeros(0, 2).int(), torch.zeros(0, 4, requires_grad=True)
    values = [
        *ours(ids, scores).values(),
        losses.importance(ids, torch.zeros(0, 2), 4),
        losses.load(scores, scores, scores, 2),
        losses.router_z(torch.zeros(0)),
    ]
    assert [value.item() for value in values] == [0.0] * len(values)
    sum(values).backward()
    assert scores.grad.shape == (0, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_inside(dtype):
    # 300 tokens of weight 1: bfloat16 counts to 256 and float16 sums of squares overflow.
    ids = torch.zeros(300, 1).int()
    value = losses.importance(ids, torch.ones(300, 1, dtype=dtype), 2)
    assert value.dtype == torch.float32
    assert value.item() == 1.0  # sums 300, 0: variance 150^2, mean 150
    assert losses.router_z(torch.full((300,), 300.0, dtype=dtype)).item() == 90000.0
    scores = torch.full((300, 2), 0.5, dtype=dtype)
    assert losses.sequence_balance(ids, scores).item() == 1.0
    assert_close(losses.switch_balance(ids, scores.float().sum(0)), torch.tensor(1.0))


def test_bad_sizes():
    with pytest.raises(ValueError, match="num_experts=4 is no multiple of num_devices=3"):
        losses.device_balance(TWO, P4, 3)
    with pytest.raises(ValueError, match="T=2 tokens are no multiple of sequence_length=3"):
        losses.sequence_balance(TWO, torch.ones(2, 4), 3)
    with pytest.raises(TypeError, match=r"group is str, expected a torch.distributed.ProcessGroup"):
        losses.switch_balance(IDS, SUM, group="world")
