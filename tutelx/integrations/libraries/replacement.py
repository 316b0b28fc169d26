"""The layer that takes the place of a library's. T tokens, M model dim, E experts, K choices, C capacity."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from tutelx.errors import InvalidTypeError, InvalidValueError
from tutelx.experts import ListedExperts
from tutelx.experts.linked import LinkedExperts
from tutelx.integrations.libraries.structure import child
from tutelx.integrations.replacement import Replacement
from tutelx.integrations.spec import LibrarySpec
from tutelx.types import Plan, Routing


class LibraryMoE(Replacement):
    """Runs the gate and the experts of `original` in its place, and returns and leaves behind what it does."""

    spec: LibrarySpec
    # Attributes that the original's forward leaves behind for others to read.
    leaves: tuple[str, ...] = ()
    # Where the list of experts is, if they are one.
    experts_path: str = ""

    def examples(self, rows: int = 32) -> list[tuple]:
        """Positional arguments for the original's forward: a few tokens, some equal, so that experts are full.

        rows: the least tokens of each.
        """
        raise NotImplementedError

    def observed(self) -> AbstractContextManager[list]:
        """While it lasts, what the forward files elsewhere is held in the list, and nowhere else."""
        return nullcontext([])

    def run(self, *args: Any, **named: Any) -> Any:
        """What the original returns."""
        raise NotImplementedError

    def steps_aside(self, *args: Any, **named: Any) -> bool:
        """Is this a call that only the original knows how to run?"""
        return False

    def forward(self, *args: Any, plan: Plan | None = None, **named: Any) -> Any:
        """Takes what the original's forward takes, and a plan for this call only."""
        if self.steps_aside(*args, **named):
            self.original.training = self.training
            return self.original.forward(*args, **named)
        return self.run(*args, plan=plan, **named)

    def leave(self, name: str, value: Any) -> None:
        """Where the original's forward would leave it: reading it here finds it too."""
        setattr(self.original, name, value)

    def run_routed(self, x: torch.Tensor, routing: Routing, experts: Any, plan: Plan | None) -> torch.Tensor:
        """x [..., M] -> [..., M] by what the library's gate has decided for its tokens in order."""
        y = self._run(x, lambda *args, **named: routing, experts, plan=plan)
        return y.to(x.dtype) if self.spec.keeps_dtype else y

    def linked(self) -> LinkedExperts | None:
        formula = self.spec.formula
        return None if formula is None else LinkedExperts(self._list(), formula, plain=self.plain)

    def listed(self) -> LinkedExperts | ListedExperts:
        """The compiled network where the experts were found to be one, else each module called with its own rows."""
        return self.linked() or ListedExperts(self._list())

    def _list(self) -> nn.ModuleList:
        experts = child(self, self.experts_path)
        assert isinstance(experts, nn.ModuleList)
        return experts

    def _check_input(self, x: torch.Tensor) -> torch.Tensor:
        # The gate and the experts may be of different dtypes here: the operators have the last word.
        if not isinstance(x, torch.Tensor):
            raise InvalidTypeError(f"x is {type(x).__name__}, expected torch.Tensor")
        if x.dim() == 0 or x.shape[-1] != self.model_dim:
            raise InvalidValueError(f"x has shape {tuple(x.shape)}, expected [..., model_dim={self.model_dim}]")
        return x


def routing_of(combine_TEC: torch.Tensor, top_k: int) -> Routing:
    """The choices behind GShard's dense combine tensor [..., E, C], of which a token fills at most one row an expert.

    A token with more than top_k experts would lose the smallest, so top_k has to be the gate's own.
    """
    weights_TE = combine_TEC.flatten(0, -3).sum(dim=-1)
    weights_TK, ids_TK = weights_TE.topk(min(top_k, weights_TE.shape[1]), dim=1)
    ids_TK = torch.where(weights_TK > 0, ids_TK, -1)
    wide = torch.float64 if weights_TK.dtype == torch.float64 else torch.float32
    return Routing(expert_ids=ids_TK.int(), weights=weights_TK.to(wide))
