"""The layer that takes the place of somebody else's."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tutelx.base import MoEBase
from tutelx.errors import InvalidTypeError
from tutelx.experts.linked import LinkedExperts
from tutelx.integrations.spec import LayerSpec, LibrarySpec
from tutelx.types import Capacity, Plan, Planner, Routing


class Replacement(MoEBase):
    """Stands in the place of `original`; :func:`tutelx.unwrap` puts it back.

    The two share one dictionary of children, and those of parameters and buffers, so state-dict keys are the same,
    whatever is exchanged later. Attributes and methods that are not found here are those of `original`.
    """

    spec: Any
    plain = False  # while it is compared with the original: experts one by one, so that few gradients exist at a time

    def __init__(
        self, original: nn.Module, spec: LayerSpec | LibrarySpec, *, capacity: Capacity, planner: Planner | None
    ) -> None:
        super().__init__(model_dim=spec.model_dim, num_experts=spec.num_experts, capacity=capacity, planner=planner)
        self.spec = spec
        self.training = original.training
        state = self.__dict__
        for held in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
            state[held] = original.__dict__[held]
        # Not registered: a child's parameters would appear twice.
        state["_original"] = original

    @property
    def original(self) -> nn.Module:
        """The layer that this one replaces."""
        return self.__dict__["_original"]

    def linked(self) -> LinkedExperts | None:
        """The experts, where they are a list of modules that run as one network."""
        return None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            original = self.__dict__.get("_original")
            if original is None:  # while being unpickled
                raise
            return getattr(original, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # The numbers were found with the value it had: taking another one silently would be a wrong answer.
        original = self.__dict__.get("_original")
        if original is not None and name in vars(original) and name not in self.__dict__:
            raise AttributeError(
                f"{name!r} belongs to the wrapped {type(original).__name__}: unwrap it, set {name!r} to {value!r} and"
                " wrap again, or pass top_k, capacity or plan with the call"
            )
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        return f"{type(self.original).__name__}: {self.spec}, capacity={self.capacity}"


class WrappedMoE(Replacement):
    """A router and a list of experts, as people write them by hand."""

    spec: LayerSpec

    def linked(self) -> LinkedExperts:
        spec = self.spec
        experts = self._modules[spec.experts]
        assert isinstance(experts, nn.ModuleList)
        return LinkedExperts(experts, spec.formula, zero_unused=spec.zero_unused, plain=self.plain)

    def forward(
        self,
        x: torch.Tensor | None = None,
        *,
        top_k: int | None = None,
        capacity: Capacity | None = None,
        plan: Plan | None = None,
        **named: torch.Tensor,
    ) -> Any:
        """x [..., M] -> what the original returns for it; top_k, capacity and plan hold for this call only.

        `x` may also be given under the name that it has in the original's forward.

        Raises:
            InvalidTypeError: x is missing, or an argument is unknown.
            InvalidValueError: a wrong last dimension, top_k outside [1, E], a plan that the experts cannot run.
        """
        spec = self.spec
        if x is None:
            x = named.pop(spec.input_name, None)
        if x is None or named:
            given = ", ".join(named) or "nothing"
            raise InvalidTypeError(f"{given} was given, expected {spec.input_name}, top_k, capacity or plan")
        router = self._modules[spec.router]
        assert router is not None
        seen: list[torch.Tensor] = []

        def gate(x_TM: torch.Tensor, top_k: int | None, *, capacity: Capacity, prioritized: bool) -> Routing:
            logits_TE = router(x_TM)
            seen.append(logits_TE)
            return spec.rule.route(logits_TE, top_k)

        linked = self.linked()
        y = self._run(x, gate, linked, top_k=top_k, capacity=capacity, plan=plan)  # type: ignore[arg-type]
        if spec.keeps_dtype:
            y = y.to(x.dtype)
        if spec.returns == "tensor":
            return y
        logits_TE = seen[0]
        if spec.returns == "with_batched_logits":
            return y, logits_TE.reshape(*x.shape[:-1], logits_TE.shape[1])
        return y, logits_TE
