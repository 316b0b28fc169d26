"""Every op on CUDA: the checks of tests/ops, and what only shows on a device."""

import itertools
import subprocess
import sys

import pytest
import torch

from tests.cases import DTYPES, ODD_CASES, Case, expert_ids, expert_weights, tensor
from tests.ops import checks
from tests.tolerance import assert_close
from tutelx import ops
from tutelx.ops.activation import ACTIVATIONS
from tutelx.ops.expert_products import expert_products, groupable

CUDA = "cuda"
# Long enough for several blocks, rounds and chunks; rows of whole vectors, and not.
LONG_CASES = [
    Case(tokens=5000, top_k=1, num_experts=8, dim=1096, unused=0.1),
    Case(tokens=3001, top_k=2, num_experts=64, dim=3400, skew=0.3),
    Case(tokens=1000, top_k=8, num_experts=300, dim=129),
]
GATES = [(1, 1, 1), (7, 3, 3), (33, 17, 2), (300, 64, 2), (5, 130, 40), (3, 1024, 8), (9000, 256, 8)]
FORMS = list(itertools.product([True, False], repeat=3))
# Multiples of 8, as grouped products want them in bfloat16.
EXPERTS = Case(tokens=45, top_k=2, num_experts=5, dim=16, skew=0.4, unused=0.1)


@pytest.mark.parametrize("case", [*ODD_CASES, *LONG_CASES], ids=str)
@pytest.mark.parametrize(("capacity", "layout"), [*checks.CAPACITIES, (None, "padded"), (1000, "ragged")])
def test_route(case, capacity, layout):
    checks.check_route(case, capacity, layout, CUDA)
    order = torch.randperm(case.tokens, generator=torch.Generator().manual_seed(0))
    checks.check_route(case, capacity, layout, CUDA, order=order)


def test_route_of_int64_and_strided_ids():
    ids = expert_ids(ODD_CASES[3]).to(CUDA)
    expected = checks.as_lists(ops.route(ids, 11))
    assert checks.as_lists(ops.route(ids.long(), 11)) == expected
    assert checks.as_lists(ops.route(torch.stack([ids, ids], dim=2)[:, :, 0], 11)) == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ODD_CASES, ids=str)
@pytest.mark.parametrize(("capacity", "layout"), checks.CAPACITIES)
def test_encode(case, capacity, layout, dtype):
    checks.check_encode(case, capacity, layout, dtype, CUDA)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ODD_CASES, ids=str)
@pytest.mark.parametrize(("capacity", "layout"), checks.CAPACITIES)
def test_decode(case, capacity, layout, dtype):
    for weights in dict.fromkeys((dtype, torch.float32)):
        checks.check_decode(case, capacity, layout, dtype, weights, CUDA)


@pytest.mark.parametrize("case", LONG_CASES, ids=str)
def test_long_rows_and_many_tokens(case):
    """The same as on the CPU, which the references check."""
    ids = expert_ids(case)
    maps = [ops.route(each, case.num_experts, 40, layout="padded") for each in (ids, ids.to(CUDA))]
    x, weights = tensor(case.tokens, case.dim, grad=True), tensor(case.tokens, case.top_k, seed=1, grad=True)
    results = []
    for map, device in zip(maps, ("cpu", CUDA)):
        rows = ops.encode(x.to(device), map)
        y = ops.decode(rows * 2, map, weights.to(device))
        results.append([rows, y, *torch.autograd.grad(y.square().sum(), (x, weights))])
    for expected, given in zip(*results):
        assert_close(given.cpu(), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), GATES)
def test_gate(tokens, experts, top_k, score, normalize, dtype):
    checks.check_gate(tokens, experts, top_k, dtype, CUDA, score=score, normalize=normalize)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("best_of_group", [1, 2])
def test_gate_with_groups(best_of_group, biased, dtype):
    sizes = (300, 64, 6, 8, 3), (5, 99, 20, 33, 11), (5000, 16, 2, 4, 2)
    for tokens, experts, top_k, num_groups, kept_groups in sizes:
        groups = {"num_groups": num_groups, "kept_groups": kept_groups, "best_of_group": best_of_group}
        checks.check_gate(tokens, experts, top_k, dtype, CUDA, score="sigmoid", biased=biased, **groups)


def test_gate_breaks_ties_as_on_the_cpu():
    logits = torch.randint(-2, 3, (500, 40), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(ops.gate(logits.to(CUDA), 7).expert_ids.cpu(), ops.gate(logits, 7).expert_ids)


def test_gate_ranks_nan_last_where_it_cannot_raise():
    """An error would have to wait for the device: NaN stays visible in what the losses are made of."""
    logits = tensor(4, 6).to(CUDA)
    logits[1, 2] = torch.nan
    logits[2] = torch.nan
    gated = ops.gate(logits, 3)
    ids = gated.expert_ids.cpu()
    assert 2 not in ids[1]
    assert ids[2].tolist() == [0, 1, 2]
    assert gated.logsumexp.isnan().tolist() == [False, True, True, False]
    assert gated.score_sum.isnan().all()


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activation(kind, dtype, gated):
    checks.check_activation(dtype, kind, gated, CUDA)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ODD_CASES, ids=str)
def test_clear_empty(case, dtype):
    map = checks.mapped(case, 3, "padded", CUDA)
    rows = tensor(map.num_rows, case.dim, dtype=dtype).to(CUDA)
    expected = torch.where((map.source < 0)[:, None], 0, rows)
    assert torch.equal(ops.clear_empty(rows, map), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("gated", "bias", "listed"), FORMS)
@pytest.mark.parametrize(("capacity", "layout"), [(None, "ragged"), (6, "padded"), (40, "padded")])
def test_experts(capacity, layout, gated, bias, listed, dtype):
    map = checks.mapped(EXPERTS, capacity, layout, CUDA)
    weights = expert_weights(5, EXPERTS.dim, 24, gated=gated, bias=bias, listed=listed, dtype=dtype)
    weights = checks.moved(weights, CUDA)
    checks.check_expert_ffn(EXPERTS, map, weights, dtype, CUDA)
    kernels = ["tiled"]
    if layout == "padded":
        kernels.append("bmm")
    if groupable(5, EXPERTS.dim, 24, dtype, torch.device(CUDA, 0)):
        kernels.append("grouped")
    for kernel in kernels:
        checks.check_expert_ffn(EXPERTS, map, weights, dtype, CUDA, run=expert_products, kernel=kernel)


def test_experts_of_many_rows_and_no_rows():
    for case in (Case(tokens=3000, top_k=2, num_experts=40, dim=256, skew=0.5), Case(**{**vars(EXPERTS), "tokens": 0})):
        map = checks.mapped(case, None, "ragged", CUDA)
        made = expert_weights(
            case.num_experts, case.dim, 512, gated=True, bias=True, listed=False, dtype=torch.bfloat16
        )
        checks.check_expert_ffn(case, map, checks.moved(made, CUDA), torch.bfloat16, CUDA)


def test_slices_and_strides():
    """A slice that begins within a vector, and transposed tensors: element by element, or copied."""
    case = LONG_CASES[0]
    map = checks.mapped(case, None, "ragged", CUDA)
    x, weights = tensor(case.tokens, case.dim).to(CUDA), tensor(case.tokens, case.top_k).to(CUDA)
    rows = ops.encode(x, map)
    y = ops.decode(rows, map, weights)

    def shifted(t):
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view_as(t)

    def turned(t):
        return t.T.contiguous().T

    for change in (shifted, turned):
        assert torch.equal(ops.encode(change(x), map), rows)
        assert torch.equal(ops.decode(change(rows), map, change(weights)), y)
        grads = torch.ops.tutelx.decode_backward(change(y), change(rows), map.dest, map.source, weights)
        for a, b in zip(grads, torch.ops.tutelx.decode_backward(y, rows, map.dest, map.source, weights)):
            assert_close(a, b)
        assert_close(ops.activation(change(rows), rows), ops.activation(rows, rows))
    both = torch.cat([rows, rows + 1], dim=1)
    gate, up = both.chunk(2, dim=1)
    assert torch.equal(ops.activation(gate, up), ops.activation(gate.contiguous(), up.contiguous()))


def test_gradcheck():
    case = ODD_CASES[3]
    map = checks.mapped(case, 2, "padded", CUDA)
    x = checks.leaf(case.tokens, 4, dtype=torch.float64, device=CUDA)
    weights = checks.leaf(case.tokens, case.top_k, dtype=torch.float64, seed=1, device=CUDA)
    rows = ops.encode(x, map).detach().requires_grad_()
    check = torch.autograd.gradcheck
    assert check(lambda x: ops.encode(x, map), x)
    assert torch.autograd.gradgradcheck(lambda x: ops.encode(x, map), x)
    assert check(lambda r, w: ops.decode(r, map, w), (rows, weights))
    assert check(lambda g, u: ops.activation(g, u), (x, x.detach().clone().requires_grad_()))
    logits = checks.leaf(5, 6, dtype=torch.float64, device=CUDA)
    for score in ("softmax", "sigmoid"):
        assert check(lambda x: ops.gate(x, 3, score=score)[1:], logits)  # noqa: B023
    made = checks.moved(expert_weights(11, 4, 5, gated=True, bias=True, listed=False, dtype=torch.float64), CUDA)

    def experts(rows, up):
        return expert_products(rows, map, ops.ExpertWeights(gate=made.gate, up=(up,), down=made.down), kernel="bmm")

    assert check(experts, (rows, made.up[0]))


def test_opcheck():
    case, kernels = ODD_CASES[3], torch.ops.tutelx
    ids = expert_ids(case).to(CUDA)
    map = ops.route(ids, case.num_experts, 2, layout="padded")
    x = checks.leaf(case.tokens, 4, dtype=torch.float64, device=CUDA)
    rows = checks.leaf(map.num_rows, 4, dtype=torch.float64, device=CUDA)
    weights = checks.leaf(case.tokens, case.top_k, dtype=torch.float64, device=CUDA)
    check = torch.library.opcheck
    check(kernels.route.default, (ids, case.num_experts, 2, True, None))
    check(kernels.encode.default, (x, map.source, map.dest))
    check(kernels.decode.default, (rows, map.dest, map.source, weights))
    check(kernels.activation.default, (x, x.detach().clone().requires_grad_(), "silu"))
    check(kernels.clear_empty.default, (rows.detach().clone(), map.source))
    # opcheck's own compile test adds up all outputs and fails on integer ones.
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    check(kernels.gate.default, (x, 3, "softmax", True), test_utils=utils)


def test_bits_repeat():
    case = Case(tokens=20_000, top_k=4, num_experts=64, dim=512, skew=0.2, unused=0.05)
    logits = checks.leaf(case.tokens, case.num_experts, dtype=torch.bfloat16, device=CUDA)
    x = checks.leaf(case.tokens, case.dim, dtype=torch.bfloat16, seed=1, device=CUDA)
    ids = expert_ids(case).to(CUDA)
    made = expert_weights(64, 512, 256, gated=True, bias=True, listed=False, dtype=torch.bfloat16)
    experts = checks.moved(made, CUDA)

    def run():
        gated = ops.gate(logits, case.top_k)
        map = ops.route(ids, case.num_experts)
        rows = ops.expert_ffn(ops.encode(x, map), map, experts)
        y = ops.decode(rows, map, gated.weights)
        loss = y.float().square().sum() + gated.logsumexp.sum() + gated.score_sum.square().sum()
        grads = torch.autograd.grad(loss, (x, logits, experts.up[0], experts.up_bias[0]))
        return [*gated, map.dest, map.source, map.counts, rows, y, *grads]

    first = run()
    for _ in range(4):
        assert all(torch.equal(a, b) for a, b in zip(first, run()))


def test_two_devices_are_named():
    map = checks.mapped(ODD_CASES[3], None, "ragged", CUDA)
    x = tensor(37, 4).to(CUDA)
    with pytest.raises(ValueError, match=r"(source|dest) is on cpu, x is on cuda:0"):
        torch.ops.tutelx.encode(x, map.source.cpu(), map.dest.cpu())
    with pytest.raises(ValueError, match="weights is on cpu, rows is on cuda:0"):
        ops.decode(ops.encode(x, map), map, tensor(37, 2))


@pytest.mark.parametrize("bad", [11, -2])
def test_an_expert_out_of_range_stops_the_device(bad):
    """In a process of its own: a failed assertion ends everything on the device."""
    code = f"""
import torch
from tutelx import ops
ids = torch.zeros((40, 2), dtype=torch.int32, device="cuda")
ids[31, 1] = {bad}
ops.route(ids, 11)
torch.cuda.synchronize()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert "route: expert id outside [-1, num_experts)" in done.stderr
