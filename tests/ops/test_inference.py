"""inference against the four operators that it is made of, bit for bit; they have references of their own."""

import pytest
import torch

from tests.cases import DTYPES, ODD_CASES, Case, expert_ids, expert_weights, tensor
from tutelx import ops
from tutelx.errors import InvalidValueError

CASES = [*ODD_CASES, Case(tokens=45, top_k=2, num_experts=5, dim=19, skew=0.4)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gives_the_bits_of_its_parts(case, gated, dtype):
    x, ids = tensor(case.tokens, case.dim, dtype=dtype), expert_ids(case)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weights = tensor(case.tokens, case.top_k, dtype=wide, seed=1)
    experts = expert_weights(
        case.num_experts, case.dim, 11, gated=gated, bias=True, listed=False, dtype=dtype, grad=False
    )
    y, map = ops.inference(x, ids, weights, experts, num_experts=case.num_experts, activation="gelu", tile_rows=7)
    expected = ops.route(ids, case.num_experts)
    rows = ops.expert_ffn(ops.encode(x, expected), expected, experts, activation="gelu", tile_rows=7)
    assert torch.equal(y, ops.decode(rows, expected, weights))
    for name in ("dest", "source", "counts", "offsets"):
        assert torch.equal(getattr(map, name), getattr(expected, name)), name
    assert (map.layout, map.capacity, map.num_experts) == ("ragged", None, case.num_experts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("hidden", [512, 1100])
def test_gives_the_bits_of_its_parts_at_the_sizes_of_a_model(hidden, dtype):
    """Tokens that crowd one expert, rows of several pages, more slots than experts."""
    torch.manual_seed(0)
    x, ids = tensor(64, 1024, dtype=dtype), torch.rand(64, 8).topk(3).indices.int()
    ids[:40, 2] = -1
    weights = tensor(64, 3, seed=1)
    experts = expert_weights(8, 1024, hidden, gated=True, bias=False, listed=True, dtype=dtype, grad=False)
    y, map = ops.inference(x, ids, weights, experts, num_experts=8)
    rows = ops.expert_ffn(ops.encode(x, map), map, experts)
    assert torch.equal(y, ops.decode(rows, map, weights))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("settings", [{}, {"normalize": False}, {"score": "sigmoid"}], ids=str)
def test_with_the_gate_before_it(settings, dtype):
    x, router = tensor(9, 20, dtype=dtype), tensor(6, 20, dtype=dtype, seed=1)
    experts = expert_weights(6, 20, 11, gated=True, bias=True, listed=False, dtype=dtype, grad=False)
    found = ops.gated_inference(x, router, experts, top_k=3, activation="relu", **settings)
    logits = torch.ops.tutelx.linear(x, router)
    chosen = ops.gate(logits, 3, **settings)
    y, map = ops.inference(x, chosen.expert_ids, chosen.weights, experts, num_experts=6, activation="relu")
    assert torch.equal(found.y, y)
    assert torch.equal(found.logits, logits)
    assert torch.equal(found.expert_ids, chosen.expert_ids)
    assert torch.equal(found.weights, chosen.weights)
    assert torch.equal(found.map.dest, map.dest)
    assert (found.map.num_experts, found.map.layout) == (6, "ragged")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("tokens", [17, 64, 150])
def test_with_the_gate_before_it_at_the_sizes_of_a_model(tokens, dtype):
    """So many that all threads choose at once."""
    x, router = tensor(tokens, 1024, dtype=dtype), tensor(64, 1024, dtype=dtype, seed=1)
    experts = expert_weights(64, 1024, 8, gated=True, bias=False, listed=False, dtype=dtype, grad=False)
    found = ops.gated_inference(x, router, experts, top_k=8)
    logits = torch.ops.tutelx.linear(x, router)
    chosen = ops.gate(logits, 8)
    assert torch.equal(found.logits, logits)
    assert torch.equal(found.expert_ids, chosen.expert_ids)
    assert torch.equal(found.weights, chosen.weights)
    y, _ = ops.inference(x, chosen.expert_ids, chosen.weights, experts, num_experts=64)
    assert torch.equal(found.y, y)


def test_a_token_without_a_choice_stops_all_threads():
    x, router = tensor(64, 1024), tensor(64, 1024, seed=1)
    x[40, 3] = float("nan")
    experts = expert_weights(64, 1024, 8, gated=True, bias=False, listed=False, dtype=torch.float32, grad=False)
    with pytest.raises(ValueError, match=r"logits\[40,0\]=nan is not a number"):
        ops.gated_inference(x, router, experts, top_k=8)


def brief_call(x, router, experts):
    settings = {"top_k": 2, "score": "softmax", "normalize": True, "activation": "silu"}
    return ops.brief_call(x, router, experts, tile_rows=64, tile_columns=64, **settings)


def if_few(x, router, experts):
    return brief_call(x, router, experts).run(x)


def test_few_tokens_and_nothing_else_to_do():
    def weights(dtype=torch.float32, grad=False):
        return expert_weights(6, 20, 11, gated=True, bias=True, listed=True, dtype=dtype, grad=grad)

    x, router, experts = tensor(64, 20), tensor(6, 20, seed=1), weights()
    expected = ops.gated_inference(x, router, experts, top_k=2)
    y, fields = if_few(x, router, experts)
    assert torch.equal(y, expected.y)
    assert all(torch.equal(a, b) for a, b in zip(fields(), expected, strict=True))
    assert if_few(tensor(65, 20), router, experts) is None
    assert if_few(x.double(), router.double(), weights(torch.float64)) is None
    assert if_few(x, router.bfloat16(), experts) is None
    assert if_few(x, router, weights(torch.bfloat16)) is None
    assert if_few(x, router, weights(grad=True)) is None
    assert if_few(x, router.clone().requires_grad_(), experts) is None
    assert if_few(x.clone().requires_grad_(), router, experts) is None
    with torch.no_grad():
        assert if_few(x, router.clone().requires_grad_(), weights(grad=True)) is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert if_few(x, router, experts) is None
    with torch.profiler.profile():
        assert if_few(x, router, experts) is None


def test_a_brief_call_of_other_tokens():
    x, router = tensor(6, 20), tensor(6, 20, seed=1)
    experts = expert_weights(6, 20, 11, gated=True, bias=False, listed=True, dtype=torch.float32, grad=False)
    call, other = brief_call(x, router, experts), tensor(2, 3, 20, seed=2)
    y, fields = call.run(other)
    expected = ops.gated_inference(other.reshape(6, 20), router, experts, top_k=2)
    assert torch.equal(y, expected.y.reshape(2, 3, 20))
    assert torch.equal(fields()[1], expected.dest)
    assert call.is_like(other)
    assert not any(call.is_like(t) for t in (tensor(7, 20), tensor(12, 10), torch.zeros(()), x.double()))
    with torch.no_grad():
        assert not call.is_like(x)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    assert not call.is_like(x)
    torch.set_num_threads(threads)


def test_gated_refusals_and_opcheck():
    x, router = tensor(9, 20), tensor(6, 20, seed=1)
    experts = expert_weights(6, 20, 11, gated=False, bias=False, listed=True, dtype=torch.float32, grad=False)
    given = (x, router, 2, "softmax", True, *experts.lists(), "silu", 64, 64)
    torch.library.opcheck(torch.ops.tutelx.gated_inference.default, given)
    with pytest.raises(InvalidValueError, match="router"):
        ops.gated_inference(x, router.clone().requires_grad_(), experts, top_k=2)
    with pytest.raises(ValueError, match="top_k=7"):
        ops.gated_inference(x, router, experts, top_k=7)
    with pytest.raises(TypeError, match="weight is BFloat16"):
        ops.gated_inference(x, router.bfloat16(), experts, top_k=2)
    with pytest.raises(ValueError, match="6 experts, the map has 5"):
        ops.gated_inference(x, router[:5], experts, top_k=2)
    with pytest.raises(ValueError, match="not a number"):
        ops.gated_inference(x * float("nan"), router, experts, top_k=2)


def test_one_column_and_experts_that_lie_the_other_way():
    x, ids, weights = tensor(1, 6).T, torch.tensor([[0, 1]] * 6, dtype=torch.int32), tensor(6, 2, seed=1)
    experts = ops.ExpertWeights(up=(tensor(2, 1, 4).mT,), down=(tensor(2, 4, 1, seed=2).mT,))
    y, map = ops.inference(x, ids, weights, experts, num_experts=2)
    assert torch.equal(y, ops.decode(ops.expert_ffn(ops.encode(x, map), map, experts), map, weights))


def test_opcheck_and_refusals():
    case = CASES[-1]
    x, ids, weights = tensor(45, 19), expert_ids(case), tensor(45, 2, seed=1)
    experts = expert_weights(5, 19, 11, gated=True, bias=False, listed=True, dtype=torch.float32, grad=False)
    given = (x, ids, weights, 5, *experts.lists(), "silu", 64, 64)
    torch.library.opcheck(torch.ops.tutelx.inference.default, given)
    for wanted in (0, 2):
        tensors = [x, ids, weights]
        tensors[wanted] = tensors[wanted].clone().requires_grad_()
        with pytest.raises(InvalidValueError, match="gradient"):
            ops.inference(*tensors, experts, num_experts=5)
    with pytest.raises(ValueError, match="expert"):
        ops.inference(x, ids, weights, experts, num_experts=6)
    with pytest.raises(ValueError, match="weights"):
        ops.inference(x, ids, weights[:, :1], experts, num_experts=5)
    with pytest.raises(TypeError, match="expert_ids"):
        ops.inference(x, ids.long(), weights, experts, num_experts=5)
    with pytest.raises(ValueError, match="outside"):
        ops.inference(x, ids + 4, weights, experts, num_experts=5)
    with pytest.raises(TypeError, match="up is"):
        ops.inference(x.bfloat16(), ids, weights, experts, num_experts=5)
    with pytest.raises(ValueError, match="tokens"):
        ops.inference(x[1:], ids, weights, experts, num_experts=5)
