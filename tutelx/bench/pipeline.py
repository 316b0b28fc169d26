"""How much of the exchange the pipeline hides behind the experts, or of the experts behind the exchange.

One layer, forward and backward, over all ranks with 1, 2, 4 or 8 chunks; beside it the experts alone and the exchange
alone. hidden = serial - pipelined, of which at most the smaller of the two can be had.

Legend: T tokens of a rank, K choices, E experts, W ranks, M model dim, H hidden dim.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tutelx import ops
from tutelx.bench.settings import DTYPES
from tutelx.bench.timing import Stats
from tutelx.comm._library import native
from tutelx.errors import InvalidValueError
from tutelx.experts import FeedForwardExperts
from tutelx.layer import MoE
from tutelx.types import Plan, Routing

DEGREES = (1, 2, 4, 8)
LEAST_ROUNDS, MOST_ROUNDS = 5, 50
_FIRST_HIDDEN, _HIDDEN_STEP, _MOST_HIDDEN = 256, 64, 2**16


@dataclass(frozen=True, kw_only=True)
class PipelineSettings:
    """tokens: of one rank. num_experts: None: one a rank. hidden_dim: None: so that the experts take as long as the
    exchange. seconds: about how long the timing takes. threads: of torch on the CPU; None leaves them."""

    tokens: int = 2048
    model_dim: int = 256
    top_k: int = 2
    num_experts: int | None = None
    hidden_dim: int | None = None
    dtype: str = "float32"
    seconds: float = 20.0
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("tokens", "model_dim", "top_k", "num_experts", "hidden_dim", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidValueError(f"{name}={value} must be at least 1")
        if self.dtype not in DTYPES:
            raise InvalidValueError(f"dtype {self.dtype!r} is none of {', '.join(DTYPES)}")
        if not (self.seconds > 0 and math.isfinite(self.seconds)):
            raise InvalidValueError(f"seconds={self.seconds} must be positive and finite")


@dataclass(frozen=True, kw_only=True)
class PipelineResult:
    """Seconds, each the slowest rank's. layer: by pipeline degree, forward and backward; 1 is serial."""

    world: int
    num_experts: int
    hidden_dim: int
    compute: Stats
    exchange: Stats
    exchange_bytes: int
    layer: dict[int, Stats]

    def hidden(self, degree: int) -> float:
        return self.layer[1].median - self.layer[degree].median

    def share(self, degree: int) -> float:
        """Of the smaller of compute and exchange."""
        return self.hidden(degree) / min(self.compute.median, self.exchange.median)

    def as_json(self) -> dict[str, Any]:
        found = asdict(self)
        found["layer"] = [{"degree": degree, **asdict(stats)} for degree, stats in self.layer.items()]
        found["hidden"] = [
            {"degree": degree, "seconds": self.hidden(degree), "share": self.share(degree)}
            for degree in self.layer
            if degree > 1
        ]
        return found


def measure(settings: PipelineSettings, group: dist.ProcessGroup, device: torch.device) -> PipelineResult:
    """All ranks of the group must call, with the same settings; all get the same result.

    Raises:
        InvalidValueError: one rank alone, or experts that do not divide among the ranks.
    """
    world = group.size()
    num_experts = world if settings.num_experts is None else settings.num_experts
    if world == 1:
        raise InvalidValueError("the group has 1 rank: there is no exchange to hide")
    if num_experts % world:
        raise InvalidValueError(f"num_experts={num_experts} is no multiple of the {world} ranks")
    bench = _Bench(settings, num_experts, group, device)
    hidden_dim = settings.hidden_dim
    if hidden_dim is None:
        hidden_dim = _calibrated(bench)
    calls = {"compute": bench.compute(hidden_dim), "exchange": bench.exchange()}
    calls |= bench.layer(hidden_dim)
    for call in calls.values():
        call()
    round_seconds = sum(bench.timed(call) for call in calls.values())
    rounds = max(LEAST_ROUNDS, min(MOST_ROUNDS, round(settings.seconds / bench.slowest([round_seconds])[0])))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):  # in turns, so that a slow moment of the machine falls on all of them
        for name, call in calls.items():
            samples[name].append(bench.timed(call))
    stats = {name: Stats.of(bench.slowest(each), 1) for name, each in samples.items()}
    return PipelineResult(
        world=world,
        num_experts=num_experts,
        hidden_dim=hidden_dim,
        compute=stats["compute"],
        exchange=stats["exchange"],
        exchange_bytes=bench.bytes_sent,
        layer={degree: stats[f"d{degree}"] for degree in DEGREES},
    )


class _Bench:
    """What is timed, on one rank."""

    def __init__(
        self, settings: PipelineSettings, num_experts: int, group: dist.ProcessGroup, device: torch.device
    ) -> None:
        self.settings, self.num_experts, self.group, self.device = settings, num_experts, group, device
        self.dtype = getattr(torch, settings.dtype)
        self.gate = _Even(num_experts, min(settings.top_k, num_experts))
        rows = settings.tokens * self.gate.top_k
        sent = torch.bincount(torch.arange(rows) % num_experts, minlength=num_experts)
        self.sent = sent.view(group.size(), -1).sum(1).tolist()
        self.bytes_sent = 0

    def layer(self, hidden_dim: int) -> dict[str, Callable[[], None]]:
        """By degree: "d1", "d2", ..."""
        settings = self.settings
        layer = MoE(
            settings.model_dim,
            hidden_dim,
            self.num_experts,
            gate=self.gate,
            mesh=self.group,
            device=self.device,
            dtype=self.dtype,
        )

        def with_degree(degree: int) -> Callable[[], None]:
            plan = Plan(pipeline_degree=degree)
            return self._forward_and_backward(settings.tokens, layer, lambda x: layer(x, plan=plan))

        return {f"d{degree}": with_degree(degree) for degree in DEGREES}

    def compute(self, hidden_dim: int) -> Callable[[], None]:
        """This rank's experts on the rows that it would be sent."""
        here = self.num_experts // self.group.size()
        rows = self.sent[self.group.rank()] * self.group.size()
        experts = FeedForwardExperts(
            self.settings.model_dim, hidden_dim, here, gated=True, device=self.device, dtype=self.dtype
        )
        ids = torch.arange(rows, dtype=torch.int32, device=self.device).remainder(here).sort().values.unsqueeze(1)
        map = ops.route(ids, here, None, layout="ragged")
        return self._forward_and_backward(rows, experts, lambda x: experts(x, map, Plan()))

    def exchange(self) -> Callable[[], None]:
        """Rows there and back, their gradients there and back."""
        exchange = native.Exchange(self.group)
        world, rank = self.group.size(), self.group.rank()
        counts = [self.sent] * world
        back = [[sent] * world for sent in self.sent]
        rows = torch.randn(sum(self.sent), self.settings.model_dim, device=self.device).to(self.dtype)

        def call() -> None:
            for _ in range(2):
                exchange.all_to_all(exchange.all_to_all(rows, counts), back)

        elsewhere = sum(self.sent) - self.sent[rank] + self.sent[rank] * (world - 1)
        self.bytes_sent = 2 * elsewhere * rows.shape[1] * rows.element_size()
        return call

    def _forward_and_backward(
        self, rows: int, module: nn.Module, run: Callable[[torch.Tensor], torch.Tensor]
    ) -> Callable[[], None]:
        x = torch.randn(rows, self.settings.model_dim, device=self.device).to(self.dtype).requires_grad_()
        grad = torch.randn_like(x)

        def call() -> None:
            for each in (x, *module.parameters()):
                each.grad = None
            run(x).backward(grad)

        return call

    def timed(self, call: Callable[[], None]) -> float:
        """All ranks begin together."""
        self._synchronize()
        dist.barrier(self.group)
        begin = time.perf_counter()
        call()
        self._synchronize()
        return time.perf_counter() - begin

    def slowest(self, seconds: list[float]) -> list[float]:
        """Of all ranks, sample by sample."""
        both = torch.tensor(seconds, dtype=torch.float64, device=self.device)
        dist.all_reduce(both, dist.ReduceOp.MAX, self.group)
        return both.tolist()

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class _Even(nn.Module):
    """Deals tokens to the experts in turn, so that all ranks send and receive alike."""

    def __init__(self, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.num_experts, self.top_k = num_experts, top_k

    def forward(self, x_TM: torch.Tensor) -> Routing:
        slots = torch.arange(x_TM.shape[0] * self.top_k, dtype=torch.int32, device=x_TM.device)
        ids_TK = (slots % self.num_experts).view(-1, self.top_k)
        weights_dtype = torch.float64 if x_TM.dtype == torch.float64 else torch.float32
        weights_TK = torch.full(ids_TK.shape, 1 / self.top_k, dtype=weights_dtype, device=x_TM.device)
        return Routing(expert_ids=ids_TK, weights=weights_TK)


def _calibrated(bench: _Bench) -> int:
    """The hidden dim at which the experts take as long as the exchange; their time is about proportional to it."""
    exchange, hidden_dim = bench.exchange(), _FIRST_HIDDEN
    exchange()
    wanted = min(bench.slowest([bench.timed(exchange) for _ in range(3)]))
    for _ in range(2):
        compute = bench.compute(hidden_dim)
        compute()
        taken = min(bench.slowest([bench.timed(compute) for _ in range(3)]))
        steps = round(hidden_dim * wanted / taken / _HIDDEN_STEP)
        hidden_dim = max(_HIDDEN_STEP, min(_MOST_HIDDEN, steps * _HIDDEN_STEP))
    return hidden_dim
