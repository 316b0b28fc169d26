"""What `experts=` of a layer means."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from tutelx.errors import InvalidValueError
from tutelx.experts.base import Experts
from tutelx.experts.custom import BatchedExperts, ListedExperts
from tutelx.experts.dropout import DroppingExperts
from tutelx.experts.ffn import FeedForwardExperts
from tutelx.ops.activation import Activation

if TYPE_CHECKING:
    from tutelx.comm.ranks import Ranks


def build_experts(
    experts: Literal["gated", "ffn"] | nn.Module,
    *,
    model_dim: int,
    hidden_dim: int,
    num_experts: int,
    activation: Activation | None,
    bias: bool,
    dropout: float,
    generator: torch.Generator | None,
    ranks: Ranks | None,
    device=None,
    dtype=None,
) -> Experts:
    """Raises InvalidValueError if there are not as many modules as experts, or `experts` is something else."""
    if dropout and experts not in ("gated", "ffn"):
        raise InvalidValueError(f"expert_dropout={dropout} is for built-in experts, not for modules")
    if isinstance(experts, nn.ModuleList):
        if ranks is not None:
            experts = _own(experts, num_experts, ranks)
        elif len(experts) != num_experts:
            raise InvalidValueError(f"experts holds {len(experts)} modules, num_experts={num_experts}")
    if isinstance(experts, nn.Module):
        if isinstance(experts, Experts):
            built = experts
        else:
            built = ListedExperts(experts) if isinstance(experts, nn.ModuleList) else BatchedExperts(experts)
        if ranks is not None:
            ranks.hold_modules(built)
        return built
    if experts not in ("gated", "ffn"):
        raise InvalidValueError(f"experts={experts!r} is neither 'gated', 'ffn' nor a module")
    gated = experts == "gated"
    build: Callable[..., Experts] = FeedForwardExperts
    if dropout:
        build = partial(DroppingExperts, p=dropout, generator=generator)
    return build(
        model_dim,
        hidden_dim,
        num_experts,
        gated=gated,
        activation=activation or ("silu" if gated else "gelu"),
        bias=bias,
        ranks=ranks,
        device=device,
        dtype=dtype,
    )


def _own(experts: nn.ModuleList, num_experts: int, ranks: Ranks) -> nn.ModuleList:
    """This rank's modules under the names that they have among all, so that state dicts of all ranks fit together."""
    own = ranks.placement.experts_of(ranks.mesh.rank)
    if len(experts) not in (len(own), num_experts):
        raise InvalidValueError(
            f"experts holds {len(experts)} modules, expected the {len(own)} of rank {ranks.mesh.rank} or all"
            f" num_experts={num_experts}"
        )
    mine = list(experts)[own.start : own.stop] if len(experts) == num_experts else list(experts)
    named = nn.ModuleList()
    for e, module in zip(own, mine):
        named.add_module(str(e), module)
    return named
