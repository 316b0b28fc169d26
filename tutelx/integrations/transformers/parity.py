"""Does tutelx compute what an experts module was written to compute?"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from tutelx.integrations.parity import GRADIENT_TOLERANCE, TOLERANCE, largest_error, relative_error
from tutelx.integrations.sandbox import Sandbox, substituted
from tutelx.integrations.transformers.experts import experts_forward
from tutelx.integrations.transformers.registry import eager_forward

Gradients = Mapping[str, "torch.Tensor | None"]


def mismatch(experts: nn.Module, *, model_dim: int, tokens: int, weights: bool) -> str | None:
    """Runs both on `tokens` random tokens, two experts each; None if they agree, else what does not, and how far.

    weights: compare the gradients of the parameters too, which eager pays for with a full-size gradient an expert.
    """
    generator = torch.Generator().manual_seed(0)
    E = int(experts.num_experts)  # type: ignore[arg-type]
    K = min(2, E)
    parameter = next(experts.parameters())
    x = torch.randn((tokens, model_dim), generator=generator).to(parameter)
    chosen = torch.rand((tokens, E), generator=generator).argsort(dim=1)[:, :K].to(parameter.device)
    share = torch.rand((tokens, K), generator=generator).to(parameter)
    names = [name for name, _ in experts.named_parameters()] if weights else []
    with Sandbox(experts), torch.enable_grad():
        expected_y, expected = _run(experts, eager_forward(experts), (x, chosen, share), names)
        given_y, given = _run(experts, experts_forward, (x, chosen, share), names)
    if not torch.isfinite(expected_y).all():
        return "gives values that are not finite for random tokens, so that nothing can be compared"
    # Some gates and sums go through float32 whatever the dtype.
    dtype = torch.float32 if parameter.dtype == torch.float64 else parameter.dtype
    limit, gradient_limit = TOLERANCE[dtype], GRADIENT_TOLERANCE[dtype]
    if (error := relative_error(given_y, expected_y)) > limit:
        return f"computes something else: relative error {error:.1e} of the output, tolerance {limit:.0e}"
    error, where = largest_error(given, expected)
    if error > gradient_limit:
        return f"has another gradient of {where}: relative error {error:.1e}, tolerance {gradient_limit:.0e}"
    return None


def _run(
    experts: nn.Module, forward: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...], names: list[str]
) -> tuple[torch.Tensor, Gradients]:
    x, chosen, share = inputs
    own = dict(experts.named_parameters())
    aliases = {parameter: parameter.detach() for parameter in own.values()}
    leaves = {"the tokens": x.clone().requires_grad_(), "the routing weights": share.clone().requires_grad_()}
    leaves |= {name: aliases[own[name]].requires_grad_() for name in names}
    with substituted(experts, aliases):
        y = forward(experts, leaves["the tokens"], chosen, leaves["the routing weights"])
    weigh = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    grads = torch.autograd.grad((y * weigh).sum(), list(leaves.values()), allow_unused=True)
    return y.detach(), dict(zip(leaves, grads))
