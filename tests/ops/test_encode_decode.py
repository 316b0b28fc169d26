"""encode and decode against row-by-row loops; gradients against autograd through those loops."""

import pytest
import torch

from tests.cases import DTYPES, ODD_CASES, expert_ids, tensor
from tests.ops.checks import CAPACITIES, check_decode, check_encode, mapped
from tests.tolerance import assert_close
from tutelx import ops


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ODD_CASES, ids=str)
@pytest.mark.parametrize(("capacity", "layout"), CAPACITIES)
def test_encode_is_exact(case, capacity, layout, dtype):
    check_encode(case, capacity, layout, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ODD_CASES, ids=str)
@pytest.mark.parametrize(("capacity", "layout"), CAPACITIES)
@pytest.mark.parametrize("wide_weights", [True, False])
def test_decode(case, capacity, layout, dtype, wide_weights):
    check_decode(case, capacity, layout, dtype, torch.float32 if wide_weights else dtype)


def test_encode_decode_round_trip():
    # Weights that sum to one over equal rows give x back.
    case = ODD_CASES[2]
    map = ops.route(expert_ids(case), case.num_experts)
    x = tensor(case.tokens, case.dim, dtype=torch.float64)
    y = ops.decode(ops.encode(x, map), map, torch.full((case.tokens, case.top_k), 1 / case.top_k, dtype=torch.float64))
    assert_close(y, x)


def test_strides_and_repetition():
    case = ODD_CASES[4]
    map = mapped(case, None, "ragged")
    x = tensor(case.dim, case.tokens).T
    rows = ops.encode(x, map)
    assert torch.equal(rows, ops.encode(x.contiguous(), map))
    weights = tensor(case.top_k, case.tokens).T
    first = ops.decode(rows, map, weights)
    assert torch.equal(first, ops.decode(rows.T.contiguous().T, map, weights.contiguous()))
    assert all(torch.equal(first, ops.decode(rows, map, weights)) for _ in range(5)), "not deterministic"


def test_gradcheck():
    case = ODD_CASES[3]
    map = ops.route(expert_ids(case), case.num_experts, 2)
    x = tensor(case.tokens, 4, dtype=torch.float64, grad=True)
    weights = tensor(case.tokens, case.top_k, dtype=torch.float64, seed=1, grad=True)
    assert torch.autograd.gradcheck(lambda x: ops.encode(x, map), x)
    assert torch.autograd.gradgradcheck(lambda x: ops.encode(x, map), x)
    rows = ops.encode(x, map).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda r, w: ops.decode(r, map, w), (rows, weights))


def test_double_backward_refuses():
    case = ODD_CASES[3]
    map = mapped(case, None, "ragged")
    rows = tensor(map.num_rows, 4, grad=True)
    weights = tensor(case.tokens, case.top_k, grad=True)
    (grad,) = torch.autograd.grad(ops.decode(rows, map, weights).square().sum(), rows, create_graph=True)
    with pytest.raises(RuntimeError, match="derivative for tutelx::decode_backward is not implemented"):
        grad.sum().backward()


def test_opcheck():
    case = ODD_CASES[3]
    map = mapped(case, 2, "padded")
    x = tensor(case.tokens, 4, dtype=torch.float64, grad=True)
    rows = tensor(map.num_rows, 4, dtype=torch.float64, grad=True)
    weights = tensor(case.tokens, case.top_k, dtype=torch.float64, grad=True)
    torch.library.opcheck(torch.ops.tutelx.encode.default, (x, map.source, map.dest))
    torch.library.opcheck(torch.ops.tutelx.decode.default, (rows, map.dest, map.source, weights))
    torch.library.opcheck(torch.ops.tutelx.route.default, (expert_ids(case), case.num_experts, 2, True, None))


def test_bad_input():
    case = ODD_CASES[3]
    map = mapped(case, None, "ragged")
    x, weights = tensor(case.tokens, 4), tensor(case.tokens, case.top_k)
    rows = ops.encode(x, map)
    with pytest.raises(TypeError, match=r"x is torch.int64, expected one of torch.float32"):
        ops.encode(x.long(), map)
    with pytest.raises(ValueError, match=r"x.shape\[0\]=36 differs from the map's tokens=37"):
        ops.encode(x[1:], map)
    with pytest.raises(ValueError, match="x has 1 dimensions"):
        ops.encode(x[0], map)
    with pytest.raises(ValueError, match=r"rows.shape\[0\]=73 differs from the map's rows=74"):
        ops.decode(rows[1:], map, weights)
    with pytest.raises(ValueError, match=r"weights.shape=\(37, 1\) differs from the map's \[T, K\]=\(37, 2\)"):
        ops.decode(rows, map, weights[:, :1])
    with pytest.raises(TypeError, match=r"weights is torch.float64, expected torch.float32 or torch.float32 as rows"):
        ops.decode(rows, map, weights.double())
    with pytest.raises(TypeError, match="x is list"):
        ops.encode([1], map)


def test_a_foreign_map_is_refused():
    # The kernels read where the map points: a map that does not belong must not read past the end.
    case = ODD_CASES[3]
    map = mapped(case, None, "ragged")
    rows = tensor(map.num_rows, 4)
    dest = map.dest.clone()
    dest[0, 0] = 10_000
    with pytest.raises(ValueError, match=r"dest\[0,0\]=10000 is outside the 74 rows"):
        torch.ops.tutelx.decode(rows, dest, map.source, tensor(case.tokens, case.top_k))
    source = map.source.clone()
    source[3] = 10_000
    with pytest.raises(ValueError, match=r"source\[3\]=10000"):
        torch.ops.tutelx.encode(tensor(case.tokens, 4), source, map.dest)
