"""Two models, one text: trained side by side and timed fairly."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F

from tutelx.base import MoEBase
from tutelx.demo.settings import Settings
from tutelx.demo.text import Batches
from tutelx.errors import TutelxError

BLOCK = 4  # steps of one model before it is the other's turn
WARM_UP = 4  # steps of each model that train but are not counted


class TrainingError(TutelxError):
    """The loss left the finite numbers."""


@dataclass(frozen=True, kw_only=True)
class LayerCall:
    """What the runtime saw in one layer call, and what it did."""

    needed_capacity_factor: float
    dropped: int
    tokens_per_expert: list[int]
    plan: str
    source: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Step:
    """One training step; `layers` is empty for a model without tutelx layers."""

    loss: float
    seconds: float
    layers: list[LayerCall]


@dataclass
class Run:
    """One of the two models and what its training has recorded so far."""

    name: str
    model: nn.Module
    settings: Settings
    steps: list[Step] = field(default_factory=list)
    validation_loss: float | None = None

    def __post_init__(self) -> None:
        # fused: the update is a small, equal part of both steps instead of a large one.
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.settings.lr, fused=True)
        self.layers = [(name, m) for name, m in self.model.named_modules() if isinstance(m, MoEBase)]

    def step(self, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Trains one step and records it. The clock runs over forward, backward and update, and nothing else."""
        begin = time.perf_counter()
        self.optimizer.zero_grad()
        loss = _loss(self.model, batch)
        loss.backward()
        self.optimizer.step()
        seconds = time.perf_counter() - begin
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the loss of the {self.name} model became {loss.item()} in step {len(self.steps)}; try a lower --lr"
            )
        layers = [_look(layer) for _, layer in self.layers]
        # One append: an interrupt finds the step recorded as a whole or not at all.
        self.steps.append(Step(loss=loss.item(), seconds=seconds, layers=layers))

    def validate(self, batches: Batches, advance: Callable[[], None]) -> None:
        total = 0.0
        with torch.no_grad():
            for i in range(len(batches)):
                total += _loss(self.model, batches[i]).item()
                advance()
        self.validation_loss = total / len(batches)


def train(runs: list[Run], batches: Batches, advance: Callable[[], None]) -> None:
    """Trains all runs over the same batches, in turns of BLOCK steps.

    In turns, because a shared machine changes its speed within minutes: whatever slows it down meets both models,
    where two runs one after the other would compare two different machines. Everything here is deterministic as it
    is: an expert's tokens are distinct, so no two threads ever add to one element.
    """
    for begin in range(0, len(batches), BLOCK):
        for run in runs:
            for i in range(begin, min(begin + BLOCK, len(batches))):
                run.step(batches[i])
                advance()


def _loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    inputs, targets = batch
    logits = model(inputs).flatten(0, 1)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets.flatten())


def _look(layer: MoEBase) -> LayerCall:
    stats, decision = layer.stats, layer.last_decision
    assert stats is not None, "the layer has not run"
    assert decision is not None, "the layer has not run"
    return LayerCall(
        needed_capacity_factor=stats.needed_capacity_factor,
        dropped=stats.dropped,
        tokens_per_expert=stats.tokens_per_expert.tolist(),
        plan=str(decision.plan),
        source=decision.source,
        reason=decision.reason,
    )
