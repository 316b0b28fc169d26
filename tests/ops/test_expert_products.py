"""torch's own products against plain ones: grouped, batched, expert by expert; and clear_empty, which they use."""

import itertools

import pytest
import torch

from tests.cases import DTYPES, ODD_CASES, Case, expert_ids, expert_weights, tensor
from tests.ops.checks import check_expert_ffn, mapped
from tests.tolerance import assert_close
from tutelx import ops
from tutelx.ops.expert_products import by_torch, expert_products, groupable
from tutelx.types import DispatchMap

# Multiples of 8: grouped products want rows of whole 16-byte vectors. Expert 3 gets no row.
CASE = Case(tokens=45, top_k=2, num_experts=5, dim=16, skew=0.4, unused=0.1)
HIDDEN = 24
CAPACITIES = [(None, "ragged"), (6, "padded"), (6, "ragged"), (40, "padded")]
FORMS = list(itertools.product([True, False], repeat=3))


def map_without_expert_3(capacity: int | None, layout: str) -> DispatchMap:
    ids = expert_ids(CASE)
    ids[ids == 3] = -1
    return ops.route(ids, 5, capacity, layout=layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("gated", "bias", "listed"), FORMS)
@pytest.mark.parametrize(("capacity", "layout"), CAPACITIES)
def test_grouped(capacity, layout, gated, bias, listed, dtype):
    weights = expert_weights(5, CASE.dim, HIDDEN, gated=gated, bias=bias, listed=listed, dtype=dtype)
    check_expert_ffn(
        CASE, map_without_expert_3(capacity, layout), weights, dtype, run=expert_products, kernel="grouped"
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("gated", "bias", "listed"), FORMS)
@pytest.mark.parametrize("kernel", ["bmm", "tiled"])
def test_batched_and_one_by_one(kernel, gated, bias, listed, dtype):
    for capacity, layout in CAPACITIES:
        if kernel == "bmm" and layout == "ragged":
            continue
        weights = expert_weights(5, CASE.dim, HIDDEN, gated=gated, bias=bias, listed=listed, dtype=dtype)
        map = map_without_expert_3(capacity, layout)
        check_expert_ffn(CASE, map, weights, dtype, run=expert_products, kernel=kernel, activation="gelu")


@pytest.mark.parametrize("kernel", ["grouped", "bmm", "tiled"])
def test_no_rows_at_all(kernel):
    weights = expert_weights(3, 8, 16, gated=True, bias=True, listed=True, dtype=torch.float32)
    map = ops.route(torch.zeros((0, 2), dtype=torch.int32), 3, layout="padded")
    rows = torch.zeros((0, 8), requires_grad=True)
    expert_products(rows, map, weights, kernel=kernel).sum().backward()
    assert rows.grad.shape == (0, 8)
    for w in itertools.chain(*weights.lists()):
        assert torch.equal(w.grad, torch.zeros_like(w))


@pytest.mark.parametrize(("capacity", "layout"), [(None, "ragged"), (30, "padded")])
def test_empty_rows_neither_give_nor_get(capacity, layout):
    """Whatever the gradient of an empty row is; rows behind the last are never computed."""
    map = map_without_expert_3(capacity, layout)
    weights = expert_weights(5, CASE.dim, HIDDEN, gated=True, bias=True, listed=False, dtype=torch.float32)
    rows = ops.encode(tensor(CASE.tokens, CASE.dim), map).requires_grad_()
    empty = map.source < 0
    assert empty.any()
    grad = tensor(*rows.shape, seed=1)
    leaves = [rows, *itertools.chain(*weights.lists())]

    def gradients(value: float):
        out = expert_products(rows, map, weights, kernel="grouped")
        assert torch.equal(out[empty], torch.zeros_like(out[empty]))
        return torch.autograd.grad(out, leaves, torch.where(empty[:, None], value, grad))

    clean, dirty = gradients(0.0), gradients(1e30)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty))
    assert torch.equal(clean[0][empty], torch.zeros_like(clean[0][empty]))


def test_a_slice_and_an_expanded_gradient():
    map = ops.route(torch.tensor([[0, 1], [1, 1]]), 3)
    weights = expert_weights(3, 8, 16, gated=True, bias=False, listed=False, dtype=torch.bfloat16)
    rows = torch.cat([torch.zeros(1), tensor(4, 8).flatten()]).bfloat16()[1:].reshape(4, 8)
    assert rows.data_ptr() % 16 == 2
    given = rows.detach().requires_grad_()
    out = expert_products(given, map, weights, kernel="grouped")
    out.sum().backward()
    assert_close(out, expert_products(rows.clone(), map, weights, kernel="tiled"))
    assert given.grad.shape == rows.shape


def test_frozen_weights():
    map = map_without_expert_3(None, "ragged")
    rows = tensor(map.num_rows, CASE.dim)
    trained = expert_weights(5, CASE.dim, HIDDEN, gated=True, bias=False, listed=False, dtype=torch.float32)
    frozen = ops.ExpertWeights(gate=(trained.gate[0].detach(),), up=(trained.up[0].detach(),), down=trained.down)
    expert_products(rows, map, frozen, kernel="grouped").sum().backward()
    assert trained.down[0].grad is not None
    assert trained.gate[0].grad is None


@pytest.mark.parametrize("kernel", ["grouped", "bmm"])
def test_bits_repeat_and_gradients_are_once_differentiable(kernel):
    map = map_without_expert_3(30, "padded")
    weights = expert_weights(5, CASE.dim, HIDDEN, gated=True, bias=True, listed=False, dtype=torch.float32)
    rows = ops.encode(tensor(CASE.tokens, CASE.dim), map).requires_grad_()

    def run():
        out = expert_products(rows, map, weights, kernel=kernel)
        return [out, *torch.autograd.grad(out.square().sum(), [rows, weights.up[0], weights.up_bias[0]])]

    first = run()
    assert all(torch.equal(a, b) for a, b in zip(first, run()))
    out = expert_products(rows, map, weights, kernel=kernel)
    (grad,) = torch.autograd.grad(out.square().sum(), rows, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_batched_gradcheck():
    map = ops.route(torch.tensor([[0, 1], [1, 1]]), 3, 3)
    rows = ops.encode(tensor(2, 3, dtype=torch.float64), map).requires_grad_()
    weights = expert_weights(3, 3, 5, gated=True, bias=True, listed=False, dtype=torch.float64)

    def run(up, down_bias):
        w = ops.ExpertWeights(gate=weights.gate, up=(up,), down=weights.down, down_bias=(down_bias,))
        return expert_products(rows, map, w, kernel="bmm")

    assert torch.autograd.gradcheck(run, (weights.up[0], weights.down_bias[0]))


def test_where_grouped_products_can_run():
    def can(num_experts=3, model_dim=16, hidden_dim=24, dtype=torch.bfloat16, device="cpu"):
        return groupable(num_experts, model_dim, hidden_dim, dtype, torch.device(device))

    assert can()
    assert can(model_dim=4, hidden_dim=12, dtype=torch.float32)
    assert not can(dtype=torch.float64)
    assert not can(model_dim=12)
    assert not can(hidden_dim=20)
    assert not can(num_experts=1024)
    assert not can(device="meta")


@pytest.mark.parametrize("kernel", ["grouped", "bmm"])
def test_weights_of_any_strides(kernel):
    map = map_without_expert_3(30, "padded")
    changes = (
        lambda w: w.transpose(1, 2).contiguous().transpose(1, 2),
        lambda w: torch.stack([w, w], dim=3)[..., 0],
        lambda w: torch.cat([w.flatten(), w.flatten()])[1 : 1 + w.numel()].view_as(w),
        lambda w: torch.cat([w, w[:, :, :3]], dim=2)[:, :, : w.shape[2]],
    )
    plain = expert_weights(5, CASE.dim, HIDDEN, gated=True, bias=False, listed=False, dtype=torch.float32)
    for change in changes:
        strange = {n: (change(getattr(plain, n)[0].detach()).requires_grad_(),) for n in ("gate", "up", "down")}
        check_expert_ffn(CASE, map, ops.ExpertWeights(**strange), torch.float32, run=expert_products, kernel=kernel)


def test_the_choice_for_a_device_without_a_kernel():
    map = ops.route(torch.tensor([[0], [2]]), 3)
    rows = tensor(2, 8)
    for zero_unused in (True, False):
        listed = expert_weights(3, 8, 16, gated=False, bias=False, listed=True, dtype=torch.float32)
        by_torch(rows, map, listed, "silu", zero_unused=zero_unused).sum().backward()
        assert (listed.up[1].grad is not None) == zero_unused
    wide = expert_weights(3, 8, 16, gated=False, bias=False, listed=False, dtype=torch.float64)
    assert by_torch(rows.double(), map, wide, "silu", zero_unused=True).dtype == torch.float64


def test_refusals():
    map = ops.route(torch.tensor([[0], [2]]), 3)
    weights = expert_weights(3, 6, 8, gated=False, bias=False, listed=False, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"kernel='grouped' cannot run torch.float32 on cpu with up .* \(3, 8, 6\)"):
        expert_products(tensor(2, 6), map, weights, kernel="grouped")
    with pytest.raises(ValueError, match="kernel='bmm' needs layout='padded', not 'ragged'"):
        expert_products(tensor(2, 6), map, weights, kernel="bmm")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ODD_CASES, ids=str)
def test_clear_empty(case, dtype):
    map = mapped(case, 3, "padded")
    rows = tensor(map.num_rows, case.dim, dtype=dtype)
    expected = torch.where((map.source < 0)[:, None], 0, rows)
    assert ops.clear_empty(rows, map) is rows
    assert torch.equal(rows, expected)


def test_clear_empty_opcheck_and_refusals():
    map = mapped(ODD_CASES[3], 3, "padded")
    rows = tensor(map.num_rows, 4)
    torch.library.opcheck(torch.ops.tutelx.clear_empty.default, (rows, map.source))
    with pytest.raises(ValueError, match="rows requires a gradient"):
        ops.clear_empty(rows.clone().requires_grad_(), map)
    with pytest.raises(ValueError, match="expected contiguous rows"):
        ops.clear_empty(tensor(4, map.num_rows).T, map)
    with pytest.raises(ValueError, match=r"rows.shape\[0\]=32 differs from the map's rows=33"):
        ops.clear_empty(rows[1:], map)
