"""More elements than an int32 can count."""

import pytest
import torch

from tests.cases import Case, expert_ids
from tutelx import ops

T, D = 140_000, 16_384  # 2.3e9 elements
GIB = 2**30


@pytest.fixture(autouse=True)
def _memory():
    torch.cuda.empty_cache()
    free, needed = torch.cuda.mem_get_info()[0], 6 * T * D * 2
    if free < needed:
        pytest.skip(f"{free / GIB:.0f} GiB free, {needed / GIB:.0f} needed")
    yield
    torch.cuda.empty_cache()


def test_rows_beyond_the_range_of_int32():
    assert T * D > 2**31
    case = Case(tokens=T, top_k=1, num_experts=16, dim=D)
    map = ops.route(expert_ids(case).cuda(), 16)
    x = torch.empty((T, D), dtype=torch.bfloat16, device="cuda").uniform_(-1, 1)
    rows = ops.encode(x, map)
    token = map.source.long()
    some = torch.cat([torch.arange(100), torch.arange(T - 1000, T)]).cuda()
    assert torch.equal(rows[some], x[token[some]])
    weights = torch.full((T, 1), 0.5, device="cuda")
    y = ops.decode(rows, map, weights)
    assert torch.equal(y[some], x[some] / 2)
    del y
    grad_rows, grad_weights = torch.ops.tutelx.decode_backward(x, rows, map.dest, map.source, weights)
    assert torch.equal(grad_rows[some], x[token[some]] / 2)
    squares = x[some].double().square().sum(dim=1)
    assert torch.allclose(grad_weights[some, 0].double(), squares, rtol=1e-5)
    del grad_rows
    assert torch.equal(torch.ops.tutelx.encode_backward(rows, map.dest)[some], x[some])
    assert torch.equal(ops.activation(rows, kind="relu")[some], rows[some].relu())
