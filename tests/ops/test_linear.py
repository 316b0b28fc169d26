"""linear for few tokens, and with it the products with few rows, against float64."""

import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from tests.cases import tensor
from tests.tolerance import TOLERANCE, assert_close
from tutelx import ops

kernel = torch.ops.tutelx.linear
QUICK = (torch.float32, torch.bfloat16, torch.float16)
# Up to rows of some chunks and pages.
INPUTS = st.integers(1, 150) | st.sampled_from([512, 1023, 1024, 1100, 2081])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16], ids=str)
@given(tokens=st.integers(0, 110), outputs=st.integers(1, 70), inputs=INPUTS, seed=st.integers(0, 9))
def test_matches_float64(dtype, tokens, outputs, inputs, seed):
    x = tensor(tokens, inputs, dtype=dtype, seed=seed)
    weight = (tensor(outputs, inputs, dtype=dtype, seed=seed + 1) / inputs**0.5).to(dtype)
    assert_close(kernel(x, weight), x.double() @ weight.double().T, dtype)


@pytest.mark.parametrize("dtype", QUICK, ids=str)
@given(data=st.data(), tokens=st.integers(1, 96), outputs=st.integers(1, 70), inputs=INPUTS)
def test_the_bits_do_not_depend_on_what_lies_beside(dtype, data, tokens, outputs, inputs):
    x, weight = tensor(tokens, inputs, dtype=dtype), tensor(outputs, inputs, dtype=dtype, seed=1)
    t, o = data.draw(st.integers(0, tokens - 1)), data.draw(st.integers(0, outputs - 1))
    assert torch.equal(kernel(x, weight)[t, o], kernel(x[t:], weight[o:])[0, 0])


@pytest.mark.parametrize("dtype", QUICK, ids=str)
def test_any_strides(dtype):
    x, weight = tensor(30, 9, dtype=dtype).T[::2], tensor(30, 7, dtype=dtype, seed=1).T
    assert_close(kernel(x, weight), x.double() @ weight.double().T, dtype)


def test_a_task_for_several_threads():
    x, weight = tensor(64, 1024), tensor(67, 1024, seed=1) / 32
    assert_close(kernel(x, weight), x.double() @ weight.double().T, torch.float32)


def test_with_gradients_it_is_that_of_torch():
    x, weight = tensor(3, 5, grad=True), tensor(4, 5, seed=1, grad=True)
    y = ops.linear(x, weight)
    assert torch.equal(y, F.linear(x, weight))
    y.sum().backward()
    assert_close(x.grad, weight.sum(0).expand(3, 5))
    assert_close(weight.grad, x.sum(0).expand(4, 5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_without_products_of_16_bits(dtype, monkeypatch):
    monkeypatch.setattr(sys.modules["tutelx.ops.linear"], "_WIDENED", {dtype})
    x, weight = tensor(70, 40, dtype=dtype, grad=True), tensor(6, 40, dtype=dtype, seed=1, grad=True)
    grad = tensor(70, 6, dtype=dtype, seed=2)
    y = ops.linear(x, weight, alike=True)
    assert y.dtype == dtype
    with torch.no_grad(), torch.autocast("cpu", dtype):
        assert torch.equal(ops.linear(x, weight, alike=True), y)
    x64, weight64 = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    exact = F.linear(x64, weight64)
    assert_close(y, exact)
    given = torch.autograd.grad(y, (x, weight), grad)
    for one, other in zip(given, torch.autograd.grad(exact, (x64, weight64), grad.double())):
        assert one.dtype == dtype
        assert_close(one, other)


@torch.no_grad()
def test_autocast_and_other_shapes_are_those_of_torch():
    x, weight = tensor(2, 3, 5), tensor(4, 5, seed=1)
    assert torch.equal(ops.linear(x, weight), F.linear(x, weight))
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.linear(x[0], weight).dtype == torch.bfloat16
    error = (ops.linear(x[0], weight) - F.linear(x[0], weight)).abs().max()
    assert error <= TOLERANCE[torch.float32]


def test_opcheck_and_refusals():
    x, weight = tensor(3, 5), tensor(4, 5, seed=1)
    torch.library.opcheck(kernel.default, (x, weight))
    with pytest.raises(ValueError, match="inputs=6"):
        kernel(x, tensor(4, 6))
    with pytest.raises(TypeError, match="weight is BFloat16"):
        kernel(x, weight.bfloat16())
    with pytest.raises(ValueError, match="3 dimensions"):
        kernel(x[None], weight)
