"""expert_linear against rows multiplied one by one, its gradients against autograd."""

import importlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.cases import DTYPES, ODD_CASES, Case, expert_ids, tensor
from tests.tolerance import TOLERANCE, assert_close, relative_error
from tutelx import ops
from tutelx.ops import reference

module = importlib.import_module("tutelx.ops.expert_linear")  # `ops.expert_linear` is the function of that name

CASE = Case(tokens=45, top_k=2, num_experts=5, dim=19, skew=0.4)
OUT = 23


def parameters(case, dtype, *, bias=True):
    weight = (tensor(case.num_experts, OUT, case.dim, dtype=dtype, seed=1) / case.dim**0.5).requires_grad_()
    return (weight, tensor(case.num_experts, OUT, dtype=dtype, seed=2, grad=True)) if bias else (weight,)


def check(case, map, dtype, run=ops.expert_linear, *, bias=True, layout=lambda t: (t,), **options):
    """Outputs and all gradients against the reference in float64. `layout` makes the op's lists of a parameter."""
    leaves = (tensor(map.num_rows, case.dim, dtype=dtype, seed=9, grad=True), *parameters(case, dtype, bias=bias))
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    out = run(leaves[0], map, *(layout(leaf) for leaf in leaves[1:]), **options)
    expected = reference.expert_linear(wide[0], map, *wide[1:])
    assert_close(out, expected, what="out")
    grad = tensor(*out.shape, dtype=dtype, seed=10)
    given = torch.autograd.grad(out, leaves, grad, allow_unused=True)
    for i, (a, b) in enumerate(zip(given, torch.autograd.grad(expected, wide, grad.double(), allow_unused=True))):
        assert relative_error(a, torch.zeros_like(a) if b is None else b) <= TOLERANCE[dtype], f"gradient {i}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize(("capacity", "layout"), [(None, "ragged"), (6, "padded"), (6, "ragged")])
def test_matches_plain_products(capacity, layout, listed, bias, dtype):
    map = ops.route(expert_ids(CASE), 5, capacity, layout=layout)
    check(CASE, map, dtype, bias=bias, layout=(lambda t: t.unbind(0)) if listed else (lambda t: (t,)))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("capacity", "layout"), [(None, "ragged"), (6, "padded"), (6, "ragged")])
def test_the_way_without_a_kernel(capacity, layout, bias):
    def by_torch(rows, map, weight, bias=()):
        return module._by_torch(rows, map, weight, bias)

    check(CASE, ops.route(expert_ids(CASE), 5, capacity, layout=layout), torch.float64, by_torch, bias=bias)


@pytest.mark.parametrize("case", ODD_CASES[1:], ids=str)
def test_odd_sizes(case):
    check(case, ops.route(expert_ids(case), case.num_experts), torch.float64)


def test_no_rows_at_all():
    map = ops.route(expert_ids(ODD_CASES[0]), 4)
    weight = torch.ones(4, OUT, 8, requires_grad=True)
    out = ops.expert_linear(torch.empty(0, 8), map, (weight,))
    assert out.shape == (0, OUT)
    out.sum().backward()
    assert torch.equal(weight.grad, torch.zeros(4, OUT, 8))


@given(rows=st.integers(1, 9), columns=st.integers(1, 30), seed=st.integers(0, 9))
def test_tiles_do_not_matter(rows, columns, seed):
    map = ops.route(expert_ids(CASE, seed), 5)
    check(CASE, map, torch.float64, tile_rows=rows, tile_columns=columns)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gradient_lies_as_its_weight_does(dtype):
    map = ops.route(expert_ids(CASE), 5)
    rows = tensor(map.num_rows, CASE.dim, dtype=dtype)
    held = parameters(CASE, dtype, bias=False)[0].detach().transpose(1, 2).contiguous().requires_grad_()
    out = ops.expert_linear(rows, map, (held.transpose(1, 2),))
    assert_close(out, reference.expert_linear(rows.double(), map, held.detach().double().transpose(1, 2)))
    (grad,) = torch.autograd.grad(out.sum(), held)
    assert grad.stride() == held.stride()
    # Every output's gradient is 1: row i of expert e's gradient is the sum of its rows' i-th value.
    begin, end = map.offsets[0:2].tolist()
    assert_close(grad[0], rows[begin:end].double().sum(0)[:, None].expand(-1, OUT))


def test_frozen_sides():
    map = ops.route(expert_ids(CASE), 5)
    rows, (weight, bias) = tensor(map.num_rows, CASE.dim, grad=True), parameters(CASE, torch.float32)
    ops.expert_linear(rows, map, (weight.detach(),), (bias.detach(),)).sum().backward()
    assert rows.grad is not None
    ops.expert_linear(rows.detach(), map, (weight,), (bias.detach(),)).sum().backward()
    assert weight.grad is not None
    assert bias.grad is None


def test_deterministic_for_any_number_of_threads():
    case = Case(tokens=700, top_k=2, num_experts=7, dim=32, skew=0.6)
    map = ops.route(expert_ids(case), 7)
    rows, (weight, bias) = tensor(map.num_rows, 32, grad=True), parameters(case, torch.float32)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            out = ops.expert_linear(rows, map, (weight,), (bias,), tile_rows=64)
            results.append([out, *torch.autograd.grad(out.sum(), [rows, weight, bias])])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_gradcheck_and_opcheck():
    map = ops.route(torch.tensor([[0, 1], [1, 1]]), 3)
    rows = tensor(4, 3, dtype=torch.float64, grad=True)
    weight, bias = tensor(3, 5, 3, dtype=torch.float64, grad=True), tensor(3, 5, dtype=torch.float64, grad=True)
    assert torch.autograd.gradcheck(lambda x, w, b: ops.expert_linear(x, map, (w,), (b,)), (rows, weight, bias))
    torch.library.opcheck(
        torch.ops.tutelx.expert_linear.default, (rows, map.counts, map.offsets, [weight], [bias], 8, 8)
    )


def test_bad_arguments_are_named():
    map = ops.route(torch.tensor([[0], [2]]), 3)
    weight = torch.zeros(3, 6, 4)
    with pytest.raises(ValueError, match="weight is empty"):
        ops.expert_linear(tensor(2, 4), map, ())
    with pytest.raises(ValueError, match="weight holds 2 experts, the map has 3"):
        ops.expert_linear(tensor(2, 4), map, (weight[:2],))
    with pytest.raises(ValueError, match=r"rows.size\(1\)=5 differs from the weight's inputs=4"):
        ops.expert_linear(tensor(2, 5), map, (weight,))
    with pytest.raises(ValueError, match="bias has size 7, weight has 6 outputs"):
        ops.expert_linear(tensor(2, 4), map, (weight,), (torch.zeros(3, 7),))
    with pytest.raises(TypeError, match="weight is Float, rows are Double"):
        ops.expert_linear(tensor(2, 4, dtype=torch.float64), map, (weight,))
    with pytest.raises(ValueError, match=r"rows.shape\[0\]=3 differs from the map's rows=2"):
        ops.expert_linear(tensor(3, 4), map, (weight,))
    with pytest.raises(ValueError, match="tile_rows=0"):
        ops.expert_linear(tensor(2, 4), map, (weight,), tile_rows=0)
