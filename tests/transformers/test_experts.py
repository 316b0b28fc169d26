"""The registered implementation itself: one experts module, called as the library calls it."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from tests.tolerance import assert_close
from tests.transformers.families import build, experts_of, families
from tutelx.errors import InvalidValueError
from tutelx.integrations.transformers import NAME, experts_forward
from tutelx.integrations.transformers.registry import eager_forward, unknown_flags

BY_NAME = {family.name: family for family in families()}
T, K, E, M = 9, 2, 4, 32
# Gated and plain, transposed, biased, clamped, interleaved, and a norm behind every expert.
STYLES = ("qwen3_moe", "nemotron_h", "aria", "gpt_oss", "deepseek_v4", "openai_privacy_filter", "muse_spark", "gemma4")

SINGLE = ("openai_privacy_filter", "muse_spark")  # add up, or normalise, in float32


def experts(name: str, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    return next(iter(experts_of(build(BY_NAME[name], dtype=dtype)).values()))


def inputs(module: torch.nn.Module, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    width = module.down_proj.shape[2 if module.is_transposed else 1]
    x = torch.randn(T, width, generator=generator).to(dtype).requires_grad_()
    index = torch.rand(T, module.num_experts, generator=generator).argsort(dim=1)[:, :K]
    return x, index, torch.rand(T, K, generator=generator).to(dtype).requires_grad_()


def run(forward, module, x, index, weights) -> list[torch.Tensor]:
    y = forward(module, x, index, weights)
    leaves = [x, weights, *module.parameters()]
    grads = torch.autograd.grad((y * torch.linspace(-1, 1, y.shape[1])).sum(), leaves)
    return [y.detach(), *grads]


@pytest.mark.parametrize("style", STYLES)
def test_against_eager(style):
    module = experts(style)
    given = inputs(module)
    for ours, theirs in zip(run(experts_forward, module, *given), run(eager_forward(module), module, *given)):
        assert_close(ours, theirs, torch.float32 if style in SINGLE else torch.float64)


@pytest.mark.parametrize("style", ["qwen3_moe", "muse_spark"])
def test_an_expert_that_is_not_here(style):
    """The id `num_experts`, whatever its weight, and -1: as a smaller call without these slots."""
    module = experts(style)
    x, index, weights = inputs(module)
    index[0] = module.num_experts
    index[1, 1] = module.num_experts
    index[2, 0] = -1
    y = experts_forward(module, x, index, weights)
    assert torch.equal(y[0], torch.zeros_like(y[0]))
    assert_close(y[1:2], eager_forward(module)(module, x[1:2], index[1:2, :1], weights[1:2, :1]))
    assert_close(y[2:3], eager_forward(module)(module, x[2:3], index[2:3, 1:], weights[2:3, 1:]))
    grad_x, grad_weights = torch.autograd.grad(y.sum(), [x, weights])
    assert torch.equal(grad_x[0], torch.zeros_like(grad_x[0]))
    assert grad_weights[0].tolist() == [0, 0]
    assert grad_weights[1, 1] == grad_weights[2, 0] == 0


def test_no_tokens_at_all():
    module = experts("qwen3_moe")
    x = torch.empty(0, M, dtype=torch.float64, requires_grad=True)
    y = experts_forward(module, x, torch.empty(0, K, dtype=torch.long), torch.empty(0, K, dtype=torch.float64))
    assert y.shape == (0, M)
    y.sum().backward()
    assert torch.equal(module.gate_up_proj.grad, torch.zeros_like(module.gate_up_proj))


def test_weights_in_another_dtype_than_the_states():
    """Computed in that of the weights, handed back in that of the states; routing weights keep their float32."""
    module = experts("qwen3_moe", torch.bfloat16)
    x, index, weights = inputs(module, torch.float32)
    y, *grads = run(experts_forward, module, x, index, weights)
    assert y.dtype == torch.float32
    assert [grad.dtype for grad in grads] == [torch.float32, torch.float32, torch.bfloat16, torch.bfloat16]
    narrow = run(experts_forward, module, x.detach().bfloat16().requires_grad_(), index, weights)
    for one, other in zip([y, *grads], narrow):
        assert_close(one.to(other.dtype), other, torch.bfloat16)


@pytest.mark.parametrize("style", ["qwen3_moe", "gpt_oss"])
def test_autocast(style):
    module = experts(style, torch.float32)
    x, index, weights = inputs(module, torch.float32)
    exact = experts_forward(module, x, index, weights).detach()
    with torch.autocast("cpu", torch.bfloat16):
        ours = experts_forward(module, x, index, weights)
        theirs = eager_forward(module)(module, x, index, weights)
    assert ours.dtype == theirs.dtype == torch.float32
    assert not torch.equal(ours, exact)
    error, eager_error = (float((y.detach() - exact).norm() / exact.norm()) for y in (ours, theirs))
    assert error <= 1.5 * eager_error
    (grad,) = torch.autograd.grad(ours.sum(), module.down_proj)
    assert grad.dtype == torch.float32


def test_wrong_arguments_are_named():
    module = experts("qwen3_moe")
    x, index, weights = inputs(module)
    with pytest.raises(ValueError, match=r"expert_ids\[0,1\]=7"):
        experts_forward(module, x, index.clone().index_fill_(1, torch.tensor([1]), 7), weights)
    with pytest.raises(InvalidValueError, match=r"weights.shape=\(9, 1\) differs"):
        experts_forward(module, x, index, weights[:, :1])
    with pytest.raises(InvalidValueError, match=r"x.shape\[0\]=8 differs"):
        experts_forward(module, x[:8], index, weights)
    with pytest.raises(ValueError, match=r"rows.size\(1\)=31 differs"):
        experts_forward(module, x[:, :31], index, weights)


def test_everything_the_library_says_of_experts_is_known():
    assert unknown_flags() == set()


@pytest.mark.parametrize("style", ["qwen3_moe", "gpt_oss"])
def test_compiled_without_a_graph_break(style):
    module = experts(style)
    module.config._experts_implementation = NAME
    given = inputs(module)
    expected = run(lambda module, *args: module(*args), module, *given)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(run(lambda _, *args: compiled(*args), module, *given), expected):
        assert_close(ours, theirs)
