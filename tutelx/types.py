"""The vocabulary: what flows through one layer call, and what decides how it runs.

Shapes: T tokens, K choices a token, E experts, C capacity (rows an expert may receive), R rows, M model dim.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, get_args

from tutelx.errors import InvalidTypeError, InvalidValueError

if TYPE_CHECKING:
    import torch

Layout = Literal["ragged", "padded"]
ExpertKernel = Literal["tiled", "bmm", "grouped"]
AllToAll = Literal["linear", "2dh"]


@dataclass(frozen=True, kw_only=True)
class Routing:
    """What a gate decided.

    expert_ids: [T, K] int32, best first; -1 marks an unused choice.
    weights: [T, K] float32 (float64 for float64 input), what each expert's output is multiplied with.
    aux_losses: scalar losses by name, already multiplied by their coefficients.
    logits: [T, E], what the choice was made from, for losses of your own; None where a gate has none.
    priority: [T], greatest first: which token takes its rows first under batch-prioritised routing; None: the
        greatest weight.
    top_k: the experts a token that the capacity is a multiple of; None: K. It differs where K is only a limit.
    capacity: rows an expert may receive, where the gate itself has dropped what exceeds them; the layer's setting
        is then not applied again.
    requested: [E], the choices of each expert before the gate itself dropped any; None if it dropped none.
    """

    expert_ids: torch.Tensor
    weights: torch.Tensor
    aux_losses: Mapping[str, torch.Tensor] = field(default_factory=dict)
    logits: torch.Tensor | None = None
    priority: torch.Tensor | None = None
    top_k: int | None = None
    capacity: int | None = None
    requested: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class DispatchMap:
    """Where every (token, choice) slot goes. The kernels see `dest` and `source` and need not know the layout.

    dest: [T, K] int32, the slot's row, or -1 if it is unused or dropped.
    source: [R] int32, the flat slot t*K+k that fills the row, or -1 for an empty row.
    counts: [E] int32, slots that asked for the expert, before any drop.
    offsets: [E+1] int32, the expert's first row.
    capacity: rows an expert may receive, None if unlimited.
    """

    dest: torch.Tensor
    source: torch.Tensor
    counts: torch.Tensor
    offsets: torch.Tensor
    num_experts: int
    layout: Layout
    capacity: int | None

    @property
    def num_rows(self) -> int:
        return self.source.shape[0]


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """How many rows one expert may receive. Build it with :meth:`dropless`, :meth:`fixed` or :meth:`bounded`.

    The balanced share of an expert is K*T/E slots; a capacity factor f allows ceil(f*K*T/E) (Tutel, section 2).
    """

    mode: Literal["dropless", "fixed", "bounded"]
    factor: float | None = None

    def __post_init__(self) -> None:
        if self.mode not in ("dropless", "fixed", "bounded"):
            raise InvalidValueError(f"mode={self.mode!r} is none of 'dropless', 'fixed', 'bounded'")
        if self.mode == "dropless":
            if self.factor is not None:
                raise InvalidValueError(f"factor={self.factor} was given, but mode='dropless' takes none")
            return
        if isinstance(self.factor, bool) or not isinstance(self.factor, (int, float)):
            raise InvalidTypeError(f"factor={self.factor!r} is not a number, as mode={self.mode!r} needs")
        if not (self.factor > 0 and math.isfinite(self.factor)):
            raise InvalidValueError(f"factor={self.factor} must be positive and finite for mode={self.mode!r}")

    @classmethod
    def dropless(cls) -> Capacity:
        """As much as the fullest expert needs: no token is ever dropped."""
        return cls(mode="dropless")

    @classmethod
    def fixed(cls, factor: float) -> Capacity:
        """Always ceil(factor*K*T/E) rows an expert; what exceeds them is dropped."""
        return cls(mode="fixed", factor=factor)

    @classmethod
    def bounded(cls, factor: float) -> Capacity:
        """As much as the fullest expert needs, but at most ceil(factor*K*T/E)."""
        return cls(mode="bounded", factor=factor)

    def limit(self, *, tokens: int, top_k: int, num_experts: int) -> int | None:
        """Rows an expert may receive at most, at least 1; None if there is no limit."""
        if self.factor is None:
            return None
        # The tiny subtraction undoes binary rounding: 1.1 * 10 must not become 12.
        exact = self.factor * top_k * tokens / num_experts
        return max(1, math.ceil(exact - 1e-9 * exact))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How one call runs. A plan changes speed and rounding, never the result.

    layout: "ragged" computes the rows that arrived; "padded" gives every expert the same number of rows.
    expert_kernel: "tiled" cuts the products into tiles that threads share, or on CUDA runs expert after expert; "bmm"
        is one batched product over the padded layout, for stacked weights; "grouped" one over the rows that arrived.
    tile_rows, tile_columns: the most rows and output columns of one tile.
    shard_degree: over many ranks (Tutel, section 4.1): 0 gathers all weights and rows stay; r >= 1 sends each row to r
        of the s ranks that share its expert, which gather the expert's slices in groups of s/r.
    pipeline_degree: chunks, of which one is computed while another travels.
    all_to_all: "2dh" sends in two steps, inside the node and between nodes (Tutel, section 3.4).
    """

    layout: Layout = "ragged"
    expert_kernel: ExpertKernel = "tiled"
    tile_rows: int = 256
    tile_columns: int = 1024
    shard_degree: int = 1
    pipeline_degree: int = 1
    all_to_all: AllToAll = "linear"

    def __post_init__(self) -> None:
        if self.layout not in get_args(Layout):
            raise InvalidValueError(f"layout={self.layout!r} is none of {get_args(Layout)}")
        if self.expert_kernel not in get_args(ExpertKernel):
            raise InvalidValueError(f"expert_kernel={self.expert_kernel!r} is none of {get_args(ExpertKernel)}")
        if self.expert_kernel == "bmm" and self.layout != "padded":
            raise InvalidValueError(f"expert_kernel='bmm' needs layout='padded', not {self.layout!r}")
        if self.all_to_all not in get_args(AllToAll):
            raise InvalidValueError(f"all_to_all={self.all_to_all!r} is none of {get_args(AllToAll)}")
        for name, least in (("tile_rows", 1), ("tile_columns", 1), ("shard_degree", 0), ("pipeline_degree", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InvalidValueError(f"{name}={value!r} must be an int of at least {least}")

    def __str__(self) -> str:
        kernel = f"{self.tile_rows}x{self.tile_columns}" if self.expert_kernel == "tiled" else self.expert_kernel
        ranks = "" if self.shard_degree == 1 else f"/r{self.shard_degree}"
        ranks += "" if self.pipeline_degree == 1 else f"/d{self.pipeline_degree}"
        ranks += "" if self.all_to_all == "linear" else f"/{self.all_to_all}"
        return f"{self.layout}/{kernel}{ranks}"


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What a planner knows of one call.

    tokens, threads: over many ranks, the most tokens and the fewest threads of any rank.
    demand: the fullest expert's slots, before any drop, over many ranks those from one rank; None where reading it
        would stall the device.
    layouts, expert_kernels, shard_degrees, all_to_alls: what can run.
    world: ranks that share the experts. expert_numbers: parameters of one expert.
    load: each expert's slots from all ranks, before any drop; empty if unknown.
    """

    tokens: int
    top_k: int
    num_experts: int
    model_dim: int
    hidden_dim: int
    demand: int | None
    capacity: int | None
    dtype: str
    device: str
    training: bool
    threads: int
    layouts: tuple[Layout, ...] = ("ragged", "padded")
    expert_kernels: tuple[ExpertKernel, ...] = ("tiled",)
    shard_degrees: tuple[int, ...] = (1,)
    all_to_alls: tuple[AllToAll, ...] = ("linear",)
    world: int = 1
    ranks_per_node: int | None = None
    expert_numbers: int = 0
    load: tuple[int, ...] = ()

    @property
    def needed_capacity_factor(self) -> float | None:
        """The least factor that drops nothing: demand * E / (K*T); 0 for an empty batch, None if unknown."""
        if self.demand is None:
            return None
        slots = self.tokens * self.top_k
        return self.demand * self.num_experts / slots if slots else 0.0


@dataclass(frozen=True, kw_only=True)
class Decision:
    """A plan, where it came from, and why.

    exchange: over many ranks, what really ran between them.
    predicted_seconds: what a cost model expects of the call; None where none was asked.
    measured_seconds: what the call took where this plan was measured for such a workload; None where it never was.
    """

    plan: Plan
    source: str
    reason: str
    workload: Workload
    exchange: str = ""
    predicted_seconds: float | None = None
    measured_seconds: float | None = None


class Planner(Protocol):
    """Chooses how a call runs. Must be quick: it is asked on every call.

    Over many ranks all must choose alike. A planner whose `plan` is a function of the workload alone may say so with
    an attribute `same_on_all_ranks = True`; any other costs a second small message a call, which makes sure.

    A planner may have more:
        steady: true if equal workloads get equal plans as long as it lives. A layer then asks once for every number of
            tokens where they are few and no gradient is wanted (`tutelx.brief`), and takes no notice of their load.
        join(meeting) -> Planner: called once for each group of ranks, by all of them, before the first plan; what it
            returns plans for the group from then on (`tutelx.comm.meeting.Meeting`).
        wants_time, observe(decision, seconds): if the first is true, every call is timed and told to the second.
            seconds is None when the backward of the call begins, and its time, forward and backward, comes later.
        seconds(workload) -> float | None: what such a call is expected to take.
    """

    def plan(self, workload: Workload) -> Decision: ...
