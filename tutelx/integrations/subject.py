"""A layer under examination, and the ways to run it and its pieces. T tokens, M model dim, E experts."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from tutelx.experts.linked import ExpertFormula
from tutelx.integrations.formula import apply_formula
from tutelx.integrations.llama import Parts
from tutelx.integrations.parity import TOLERANCE, relative_error
from tutelx.integrations.sandbox import Values, substituted
from tutelx.integrations.spec import Declined, Returns

TOKENS = 8
_SPREAD = 1.5  # standard deviation of a token's logits: no score is negligible, no two are alike
_MOST_SCALE = {torch.float64: 64, torch.float32: 64, torch.bfloat16: 64, torch.float16: 8}  # float16 overflows


class Subject:
    """The layer under examination, with its own parameters or with others in their place."""

    def __init__(self, layer: nn.Module, parts: Parts, formula: ExpertFormula, values: Values | None = None) -> None:
        self.layer, self.parts, self.formula, self.values = layer, parts, formula, values
        self.rank = 3
        self.returns: Returns = "tensor"
        router = layer._modules[parts.router]
        experts = layer._modules[parts.experts]
        assert isinstance(router, nn.Linear)
        assert isinstance(experts, nn.ModuleList)
        self.router, self.experts = router, experts

    def call(self, module: nn.Module, x: torch.Tensor) -> Any:
        with substituted(module, self.values or {}):
            return module(x)

    def logits(self, x_TM: torch.Tensor) -> torch.Tensor:
        return self.call(self.router, x_TM)

    def tokens(self, seed: int, count: int = TOKENS) -> torch.Tensor:
        """[count, M] random tokens, scaled so that their logits spread; every other one less, to show small weights."""
        generator = torch.Generator().manual_seed(seed)
        x_TM = torch.randn((count, self.parts.model_dim), generator=generator).to(self.parts.device, self.parts.dtype)
        if self.parts.num_experts == 1:
            return x_TM
        spread = float(self.logits(x_TM).detach().double().std(dim=1).mean())
        if not (spread > 0 and math.isfinite(spread)):
            return x_TM
        x_TM = x_TM * min(max(_SPREAD / spread, 1 / 64), _MOST_SCALE[self.parts.dtype])
        x_TM[1::2] /= 3
        return x_TM

    def expert_outputs(self, x_TM: torch.Tensor) -> torch.Tensor:
        """[T, E, M] float64: what every expert makes of every token, checked against the formula."""
        outputs = []
        tolerance = TOLERANCE[self.parts.dtype]
        for e, expert in enumerate(self.experts):
            path = f"{self.parts.experts}.{e}"
            theirs = self.call(expert, x_TM.clone())
            if not isinstance(theirs, torch.Tensor) or theirs.shape != x_TM.shape:
                raise Declined(path, f"returns {describe(theirs)}, expected a tensor of shape {tuple(x_TM.shape)}")
            if self.values is None:
                ours = apply_formula(expert, self.formula, x_TM)
                finite_T = torch.isfinite(theirs).all(dim=1)  # float16 overflows for large tokens
                error = relative_error(ours[finite_T], theirs[finite_T])
                if error > tolerance:
                    first = f"`{self.parts.experts}.0`"
                    raise Declined(path, f"is not {self.formula} as {first} is: relative error {error:.1e}")
            outputs.append(theirs.double())
        return torch.stack(outputs, dim=1)

    def run(self, x_TM: torch.Tensor) -> torch.Tensor:
        """The layer's own output for [T, M], in the number of dimensions that it accepts."""
        x = x_TM.reshape(2, -1, x_TM.shape[1]) if self.rank == 3 else x_TM
        given = x.clone()
        y = self.call(self.layer, given)
        if not torch.equal(given, x):
            raise Declined("forward", "changes its input in place")
        if isinstance(y, tuple) and len(y) == 2 and isinstance(y[1], torch.Tensor):
            y, self.returns = y[0], self._kind_of_logits(x_TM, x, y[1])
        if not isinstance(y, torch.Tensor) or y.shape != x.shape or y.dtype != x.dtype:
            expected = f"a tensor of shape {tuple(x.shape)} in {x.dtype}"
            raise Declined("forward", f"returns {describe(y)} for {expected}, expected the same")
        return y.reshape(x_TM.shape)

    def _kind_of_logits(self, x_TM: torch.Tensor, x: torch.Tensor, second: torch.Tensor) -> Returns:
        logits_TE = self.logits(x_TM)
        batched = (*x.shape[:-1], logits_TE.shape[1])
        if second.shape in (logits_TE.shape, batched) and second.dtype == logits_TE.dtype:
            error = relative_error(second.reshape(logits_TE.shape), logits_TE)
            if error <= TOLERANCE[logits_TE.dtype]:
                return "with_logits" if second.shape == logits_TE.shape else "with_batched_logits"
        raise Declined("forward", f"returns a tuple whose second item is {describe(second)}, not the router's logits")

    def find_rank(self) -> None:
        """Both [B, T, M] and [T, M] where the layer takes both; then the two must agree."""
        x_TM = self.tokens(0)
        results: dict[int, torch.Tensor] = {}
        failures: list[Exception] = []
        for self.rank in (3, 2):
            try:
                results[self.rank] = self.run(x_TM)
            except Declined as declined:
                # A layer written for one rank only may take the other for something else.
                failures.append(declined)
            except Exception as raised:
                failures.append(Declined("forward", f"raises {type(raised).__name__}: {raised}"))
        if not results:
            raise failures[0]
        self.rank = max(results)
        if len(results) == 2:
            error = relative_error(results[2], results[3])
            if error > TOLERANCE[self.parts.dtype]:
                shapes = f"[2, {TOKENS // 2}, M] and [{TOKENS}, M]"
                raise Declined("forward", f"treats {shapes} differently: relative error {error:.1e}")
        else:
            self.run(x_TM)  # leaves `returns` to the rank that worked


def describe(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)} in {value.dtype}"
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    return type(value).__name__
