"""gate against torch's own softmax, stable sort and autograd."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.cases import DTYPES, tensor
from tests.ops.checks import check_gate
from tests.tolerance import assert_close
from tutelx import ops
from tutelx.ops import reference

SHAPES = [(1, 1, 1), (7, 3, 3), (33, 17, 2), (300, 64, 2), (5, 130, 40), (3, 1024, 8)]
GROUPED = [  # tokens, experts, top_k, num_groups, kept_groups, best_of_group
    (1, 1, 1, 1, 1, 2),
    (7, 12, 3, 12, 5, 2),
    (300, 64, 6, 8, 3, 1),
    (5, 99, 20, 33, 11, 2),
    (3, 256, 8, 8, 4, 2),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), SHAPES)
def test_matches_torch(tokens, experts, top_k, score, normalize, dtype):
    check_gate(tokens, experts, top_k, dtype, score=score, normalize=normalize)


def test_worked_by_hand():
    # softmax of (0, ln 2, ln 5) is (1/8, 2/8, 5/8); the best two renormalised are 5/7 and 2/7.
    logits = torch.tensor([[0.0, math.log(2), math.log(5)]], dtype=torch.float64)
    ids, weights, score_sum, logsumexp = ops.gate(logits, 2)
    assert ids.tolist() == [[2, 1]]
    assert weights[0].tolist() == pytest.approx([5 / 7, 2 / 7], abs=1e-12)
    assert score_sum.tolist() == pytest.approx([1 / 8, 2 / 8, 5 / 8], abs=1e-12)
    assert logsumexp.tolist() == pytest.approx([math.log(8)], abs=1e-12)


@given(values=st.lists(st.integers(-2, 2), min_size=1, max_size=40), data=st.data())
def test_ties_go_to_the_lower_index(values, data):
    top_k = data.draw(st.integers(1, len(values)))
    logits = torch.tensor([values], dtype=torch.float32)
    wanted = sorted(range(len(values)), key=lambda e: (-values[e], e))[:top_k]
    assert ops.gate(logits, top_k).expert_ids[0].tolist() == wanted


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("tokens", "experts", "top_k", "num_groups", "kept_groups", "best_of_group"), GROUPED)
def test_groups_match_the_reference(
    tokens, experts, top_k, num_groups, kept_groups, best_of_group, biased, score, dtype
):
    groups = {"num_groups": num_groups, "kept_groups": kept_groups, "best_of_group": best_of_group}
    check_gate(tokens, experts, top_k, dtype, score=score, biased=biased, **groups)


def test_groups_worked_by_hand():
    # Three groups of two; best 3, 4, 2, sums of both 5, 4.5, 4.
    logits = torch.tensor([[3.0, 2.0, 4.0, 0.5, 2.0, 2.0]])
    assert ops.gate(logits, 3, num_groups=3, kept_groups=2).expert_ids.tolist() == [[2, 0, 1]]
    assert ops.gate(logits, 2, num_groups=3, kept_groups=1).expert_ids.tolist() == [[2, 3]]
    assert ops.gate(logits, 2, num_groups=3, kept_groups=1, best_of_group=2).expert_ids.tolist() == [[0, 1]]


def test_a_bias_chooses_and_does_not_weigh():
    # Sigmoids 0.8, 0.5, 0.2; with the bias expert 2 has 0.95. Weights 0.2 and 0.8 of their sum 1.
    logits = torch.tensor([[0.8, 0.5, 0.2]], dtype=torch.float64).logit()
    given = ops.gate(logits, 2, score="sigmoid", bias=torch.tensor([0.0, 0.0, 0.75]))
    assert given.expert_ids.tolist() == [[2, 0]]
    assert given.weights[0].tolist() == pytest.approx([0.2, 0.8], abs=1e-12)
    masked = ops.gate(logits, 2, score="sigmoid", bias=torch.tensor([-math.inf, 0.0, 0.0]))
    assert masked.expert_ids.tolist() == [[1, 2]]


@given(values=st.lists(st.integers(-2, 2), min_size=4, max_size=24), data=st.data())
def test_groups_and_experts_of_equal_value_go_to_the_lower_index(values, data):
    num_groups = data.draw(st.sampled_from([g for g in range(1, len(values) + 1) if len(values) % g == 0]))
    kept_groups, best_of_group = data.draw(st.integers(1, num_groups)), data.draw(st.integers(1, 2))
    top_k = data.draw(st.integers(1, kept_groups * len(values) // num_groups))
    logits = torch.tensor([values], dtype=torch.float32)
    options = {"num_groups": num_groups, "kept_groups": kept_groups, "best_of_group": best_of_group}
    assert torch.equal(ops.gate(logits, top_k, **options).expert_ids, reference.gate(logits, top_k, **options)[0])


def test_experts_outside_the_groups_are_never_chosen():
    # In the kept group nothing is finite but expert 2; still its other expert comes next, and weighs nothing.
    logits = torch.tensor([[1.0, 1.0, 2.0, -math.inf]])
    given = ops.gate(logits, 2, num_groups=2, kept_groups=1)
    assert given.expert_ids.tolist() == [[2, 3]]
    assert given.weights.tolist() == [[1, 0]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_groups": 3}, "num_experts=8 is no multiple of num_groups=3"),
        ({"num_groups": 0}, "num_experts=8 is no multiple of num_groups=0"),
        ({"num_groups": 2, "kept_groups": 3}, r"kept_groups=3 is outside \[1, num_groups=2\]"),
        ({"num_groups": 8, "kept_groups": 2}, "top_k=3 exceeds the 2 experts of kept_groups=2 groups"),
        ({"num_groups": 2, "best_of_group": 3}, "best_of_group=3 is neither 1 nor 2"),
        ({"bias": torch.zeros(7)}, r"bias.size\(0\)=7 differs from num_experts=8"),
        ({"bias": torch.full((8,), math.nan)}, r"bias\[0\]=nan"),
        ({"bias": torch.zeros(8, requires_grad=True)}, "bias requires a gradient"),
    ],
)
def test_bad_choices(options, message):
    with pytest.raises(ValueError, match=message):
        ops.gate(tensor(3, 8), 3, **options)


@given(shift=st.floats(-50, 50))
def test_softmax_weights_ignore_a_shift(shift):
    logits = tensor(4, 9, dtype=torch.float64)
    assert_close(ops.gate(logits + shift, 3).weights, ops.gate(logits, 3).weights)


def test_far_logits():
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e30, -2e30, -float("inf")]])
    given = ops.gate(logits, 3)
    assert given.expert_ids.tolist() == [[0, 2, 1], [0, 1, 2]]
    assert given.weights.tolist() == [[1, 0, 0], [1, 0, 0]]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_cannot_be_compared_is_named(value):
    logits = tensor(300, 6)
    logits[270, 4] = value
    with pytest.raises(ValueError, match=rf"logits\[270,4\]={value}"):
        ops.gate(logits, 2)


def test_bad_input():
    logits = tensor(3, 8)
    with pytest.raises(ValueError, match=r"logits\[0\] has no finite entry among its 8 experts"):
        ops.gate(torch.full((1, 8), -math.inf), 2)
    with pytest.raises(ValueError, match="top_k=9 exceeds num_experts=8"):
        ops.gate(logits, 9)
    with pytest.raises(ValueError, match="top_k=0 must be at least 1"):
        ops.gate(logits, 0)
    with pytest.raises(ValueError, match="num_experts"):
        ops.gate(logits[:, :0], 1)
    with pytest.raises(TypeError, match=r"logits is torch.int64"):
        ops.gate(logits.long(), 1)
    with pytest.raises(ValueError, match="score='tanh'"):
        ops.gate(logits, 1, score="tanh")


def test_empty_batch():
    logits = tensor(0, 4, grad=True)
    given = ops.gate(logits, 2)
    assert given.weights.shape == (0, 2)
    given.weights.sum().backward()
    assert logits.grad.shape == (0, 4)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalize", [True, False])
def test_gradcheck_and_opcheck(score, normalize):
    logits = tensor(5, 6, dtype=torch.float64, grad=True)
    assert torch.autograd.gradcheck(lambda x: ops.gate(x, 3, score=score, normalize=normalize)[1:], logits)
    # opcheck's own compile test adds up all outputs and fails on integer ones; the next test compiles instead.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.tutelx.gate.default, (logits, 3, score, normalize), test_utils=checks)
    bias = tensor(6, dtype=torch.float64)
    grouped = {"bias": bias, "num_groups": 3, "kept_groups": 2, "best_of_group": 2}
    assert torch.autograd.gradcheck(lambda x: ops.gate(x, 3, score=score, normalize=normalize, **grouped)[1:], logits)
    arguments = (logits, 3, score, normalize, bias, 3, 2, 2)
    torch.library.opcheck(torch.ops.tutelx.gate.default, arguments, test_utils=checks)


def test_traced_gradients():
    def loss(logits):
        gated = ops.gate(logits, 2, bias=torch.zeros(5), num_groups=5, kept_groups=3)
        return (gated.weights[:, 0] + gated.logsumexp).sum() + gated.score_sum.square().sum()

    logits = tensor(6, 5, dtype=torch.float64, grad=True)
    (expected,) = torch.autograd.grad(loss(logits), logits)
    traced = torch.compile(loss, backend="aot_eager", fullgraph=True)
    (given,) = torch.autograd.grad(traced(logits), logits)
    assert_close(given, expected)
