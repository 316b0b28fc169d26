"""Two layers side by side: outputs and all gradients."""

import torch
from torch import nn

from tests.tolerance import TOLERANCE, relative_error
from tutelx.wrapping import WrappedMoE, wrap


def tokens(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def run(layer: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    """The output, and the gradients in the input (called "x") and in each parameter."""
    layer.zero_grad(set_to_none=True)
    leaf = x.detach().clone().requires_grad_()
    y = layer(leaf)
    if y.requires_grad:
        (y * tokens(*y.shape, dtype=y.dtype, seed=2).to(y.device)).sum().backward()
    grads = {"x": leaf.grad, **{name: p.grad for name, p in layer.named_parameters()}}
    return y.detach(), {name: g if g is None else g.clone() for name, g in grads.items()}


def assert_same(layer: nn.Module, original: nn.Module, x: torch.Tensor, dtype: torch.dtype | None = None) -> None:
    """Outputs and gradients are equal to the dtype's tolerance, and the same gradients are None."""
    limit = TOLERANCE[dtype or x.dtype]
    (y, grads), (expected, expected_grads) = run(layer, x), run(original, x)
    assert relative_error(y, expected) <= limit
    assert y.dtype == expected.dtype
    if not x.numel():
        return  # a loop that skips empty experts then has no graph at all
    # A gradient that cancels to zero on paper is rounding noise on both sides.
    floor = 1e-2 * max(float(g.abs().max()) for g in expected_grads.values() if g is not None)
    for name, theirs in expected_grads.items():
        ours = grads[name]
        assert (ours is None) == (theirs is None), f"{name}: gradient {ours} against {theirs}"
        if theirs is not None:
            scale = max(float(theirs.abs().max()), floor)
            error = float((ours.double() - theirs.double()).abs().max()) / scale
            assert error <= limit, f"gradient of {name}: relative error {error:.2e}"


def wrapped(layer: nn.Module, **options) -> WrappedMoE:
    out = wrap(layer, **options)
    assert isinstance(out, WrappedMoE), "the layer was left alone"
    return out
