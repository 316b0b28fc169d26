"""expert_ffn and activation against plain products, their gradients against autograd."""

import itertools

import pytest
import torch

from tests.cases import DTYPES, ODD_CASES, Case, expert_ids, expert_weights, tensor
from tests.ops.checks import check_activation, check_expert_ffn
from tests.tolerance import assert_close
from tutelx import ops
from tutelx.ops.activation import ACTIVATIONS

CASE = Case(tokens=45, top_k=2, num_experts=5, dim=19, skew=0.4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("gated", "bias", "listed"), list(itertools.product([True, False], repeat=3)))
@pytest.mark.parametrize(("capacity", "layout"), [(None, "ragged"), (6, "padded"), (6, "ragged")])
def test_matches_plain_products(capacity, layout, gated, bias, listed, dtype):
    weights = expert_weights(5, CASE.dim, 23, gated=gated, bias=bias, listed=listed, dtype=dtype)
    map = ops.route(expert_ids(CASE), 5, capacity, layout=layout)
    check_expert_ffn(CASE, map, weights, dtype)


@pytest.mark.parametrize("case", ODD_CASES[1:], ids=str)
def test_odd_sizes(case):
    weights = expert_weights(case.num_experts, case.dim, 31, gated=True, bias=False, listed=False, dtype=torch.float64)
    check_expert_ffn(case, ops.route(expert_ids(case), case.num_experts), weights, torch.float64)


@pytest.mark.parametrize(("tile_rows", "tile_columns"), [(1, 1), (7, 5), (16, 1000)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_tiles_do_not_matter(tile_rows, tile_columns, activation):
    weights = expert_weights(5, CASE.dim, 23, gated=True, bias=True, listed=True, dtype=torch.float64)
    map = ops.route(expert_ids(CASE), 5)
    check_expert_ffn(
        CASE, map, weights, torch.float64, tile_rows=tile_rows, tile_columns=tile_columns, activation=activation
    )


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activation(kind, dtype, gated):
    check_activation(dtype, kind, gated)


def test_activation_keeps_nan_and_extremes():
    x = torch.tensor([float("nan"), 1e4, -1e4, 100.0, -100.0, 88.9, -88.9, 0.0])
    out = ops.activation(x)
    assert out[0].isnan()
    assert torch.allclose(out[1:], torch.nn.functional.silu(x[1:]), rtol=1e-6, atol=1e-36)


def test_weights_with_any_strides():
    map = ops.route(expert_ids(CASE), 5)
    plain = expert_weights(5, CASE.dim, 23, gated=True, bias=False, listed=False, dtype=torch.float64)
    rows = tensor(map.num_rows, CASE.dim, dtype=torch.float64)
    expected = ops.expert_ffn(rows, map, plain)

    def transposed(w):
        return w.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()

    def spread(w):
        return torch.stack([w.detach(), torch.zeros_like(w)], dim=3)[..., 0].requires_grad_()

    for change in (transposed, spread):
        moved = ops.ExpertWeights(
            **{n: tuple(map_(w) for map_, w in [(change, getattr(plain, n)[0])]) for n in ("gate", "up", "down")}
        )
        assert moved.up[0].stride() != plain.up[0].stride()
        check_expert_ffn(CASE, map, moved, torch.float64)
        assert_close(ops.expert_ffn(rows, map, moved), expected)


def test_gradient_of_an_expert_without_rows():
    ids = torch.tensor([[0], [2]])
    map = ops.route(ids, 3)
    rows = tensor(2, 4)
    for zero_unused in (True, False):
        weights = expert_weights(3, 4, 6, gated=True, bias=True, listed=True, dtype=torch.float32)
        ops.expert_ffn(rows, map, weights, zero_unused=zero_unused).sum().backward()
        for tensors in weights.lists():
            assert tensors[0].grad is not None
            if zero_unused:
                assert torch.equal(tensors[1].grad, torch.zeros_like(tensors[1]))
            else:
                assert tensors[1].grad is None


def test_frozen_weights_and_frozen_input():
    map = ops.route(expert_ids(CASE), 5)
    rows = tensor(map.num_rows, CASE.dim, grad=True)
    frozen = expert_weights(5, CASE.dim, 8, gated=True, bias=False, listed=True, dtype=torch.float32, grad=False)
    ops.expert_ffn(rows, map, frozen).sum().backward()
    assert rows.grad is not None
    trained = expert_weights(5, CASE.dim, 8, gated=True, bias=False, listed=True, dtype=torch.float32)
    ops.expert_ffn(rows.detach(), map, trained).sum().backward()
    assert all(w.grad is not None for w in trained.up)
    one = ops.ExpertWeights(gate=frozen.gate, up=trained.up, down=frozen.down)
    ops.expert_ffn(rows.detach(), map, one).sum().backward()
    assert all(w.grad is None for w in frozen.gate)


def test_deterministic_for_any_number_of_threads():
    case = Case(tokens=700, top_k=2, num_experts=7, dim=32, skew=0.6)
    map = ops.route(expert_ids(case), 7)
    weights = expert_weights(7, 32, 64, gated=True, bias=False, listed=False, dtype=torch.float32)
    rows = tensor(map.num_rows, 32, grad=True)
    grads = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            out = ops.expert_ffn(rows, map, weights, tile_rows=64)
            grads.append([out, *torch.autograd.grad(out.sum(), [rows, weights.up[0], weights.down[0]])])
    finally:
        torch.set_num_threads(before)
    for other in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], other))


def test_gradcheck_and_opcheck():
    map = ops.route(torch.tensor([[0, 1], [1, 1]]), 3)
    rows = tensor(4, 3, dtype=torch.float64, grad=True)
    weights = expert_weights(3, 3, 5, gated=True, bias=True, listed=False, dtype=torch.float64)

    def run(rows, *flat):
        gate, up, down, gate_bias, up_bias, down_bias = ((w,) for w in flat)
        w = ops.ExpertWeights(gate=gate, up=up, down=down, gate_bias=gate_bias, up_bias=up_bias, down_bias=down_bias)
        return ops.expert_ffn(rows, map, w)

    flat = [ws[0] for ws in weights.lists()]
    assert torch.autograd.gradcheck(run, (rows, *flat))
    lists = [list(ws) for ws in weights.lists()]
    torch.library.opcheck(
        torch.ops.tutelx.expert_ffn.default, (rows, map.counts, map.offsets, *lists, "silu", 8, 8, True, True)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {"up": (*w.up[:2], torch.zeros(4, 3))}, r"up\[2\] has shape \[4, 3\], up\[0\] has \[6, 4\]"),
        (lambda w: {"up": w.up[:2]}, "up holds 2 experts, the map has 3"),
        (lambda w: {"down": tuple(torch.zeros(5, 6) for _ in range(3))}, "down has size 5 in dimension 0, expected 4"),
        (lambda w: {"down": ()}, "down is empty"),
        (lambda w: {"up_bias": (torch.zeros(3, 7),)}, "up_bias has size 7 in dimension 0, expected 6"),
    ],
)
def test_bad_shapes(change, message):
    map = ops.route(torch.tensor([[0], [2]]), 3)
    good = expert_weights(3, 4, 6, gated=True, bias=False, listed=True, dtype=torch.float32, grad=False)
    fields = {"gate": good.gate, "up": good.up, "down": good.down, **change(good)}
    with pytest.raises(ValueError, match=message):
        ops.expert_ffn(tensor(2, 4), map, ops.ExpertWeights(**fields))


def test_bad_dtype_and_names():
    map = ops.route(torch.tensor([[0], [2]]), 3)
    weights = expert_weights(3, 4, 6, gated=True, bias=False, listed=True, dtype=torch.float32, grad=False)
    with pytest.raises(TypeError, match="up is Float, rows are Double"):
        ops.expert_ffn(tensor(2, 4, dtype=torch.float64), map, weights)
    with pytest.raises(ValueError, match="activation='swish' is none of"):
        ops.expert_ffn(tensor(2, 4), map, weights, activation="swish")
    with pytest.raises(ValueError, match=r"rows.shape\[0\]=3 differs from the map's rows=2"):
        ops.expert_ffn(tensor(3, 4), map, weights)
    with pytest.raises(ValueError, match="tile_rows=0"):
        ops.expert_ffn(tensor(2, 4), map, weights, tile_rows=0)
