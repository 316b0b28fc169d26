"""What the files of the libraries ask of a layer before its numbers are looked at."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from tutelx.experts.linked import ExpertFormula
from tutelx.integrations.formula import apply_formula, find_formula
from tutelx.integrations.llama import check_hooks, dtype_and_device
from tutelx.integrations.parity import TOLERANCE, relative_error
from tutelx.integrations.spec import Declined

if TYPE_CHECKING:
    from tutelx.integrations.libraries.replacement import LibraryMoE

_TOKENS = 4


def child(module: nn.Module, path: str) -> nn.Module | None:
    """The module below `module` at a path of names, if there is one."""
    found: nn.Module | None = module
    for name in path.split("."):
        found = None if found is None else found._modules.get(name)
    return found


def check_containers(layer: nn.Module, *paths: str) -> None:
    """Modules whose own forward no longer runs may hold no hooks that would be missed. Raises Declined."""
    check_hooks(layer, "")
    for path in paths:
        held = child(layer, path)
        assert held is not None
        check_hooks(held, path)
    dtype_and_device(layer, mixed=True)


def formula_of(experts: nn.ModuleList, model_dim: int, path: str) -> ExpertFormula | None:
    """The network that all experts are, run as one; None where they have to be called one by one."""
    try:
        formula = find_formula(experts[0], model_dim, f"{path}.0")
    except Declined:
        return None
    parameter = next(experts.parameters())
    x = tokens((_TOKENS, model_dim), parameter)
    with torch.no_grad():
        for expert in experts:
            if type(expert) is not formula.kind:
                return None
            error = relative_error(apply_formula(expert, formula, x), expert(x.clone()))
            if error > TOLERANCE[parameter.dtype]:
                return None
    return formula


def check_alone(size: int, attribute: str) -> None:
    """Raises Declined where the library itself has spread the experts over ranks."""
    if size > 1:
        raise Declined(attribute, f"is {size}: the library spreads these experts over ranks itself")


def tokens(shape: tuple[int, ...], like: torch.Tensor, *, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(like.device, like.dtype)


def batches(wrapped: LibraryMoE, like: torch.Tensor, least: int, *, rows: int = 2) -> list[torch.Tensor]:
    """Two batches [rows, n, M]: random tokens, and half of them equal, which fills one expert to its capacity."""
    model_dim = wrapped.model_dim
    count = -(-max(least, 2 * wrapped.num_experts) // rows)
    uneven = tokens((rows, count, model_dim), like, seed=1)
    uneven[:, ::2] = uneven[:1, :1]
    return [tokens((rows, count, model_dim), like), uneven]
