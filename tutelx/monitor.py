"""What every MoE layer of a model did, step by step, for whoever wants to look at it later."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from tutelx.base import MoEBase
from tutelx.errors import InvalidTypeError, InvalidValueError
from tutelx.stats import RoutingStats
from tutelx.stopwatch import Stopwatch, settle, watched
from tutelx.types import Decision

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

SCHEMA = 1

_SCALARS = ("seconds", "predicted_seconds", "measured_seconds", "needed_capacity_factor", "drop_rate")
_BYTES = ("bytes_tokens", "bytes_weights")


class Monitor:
    """Writes what the last call of each layer was, after every step or every n-th.

    ```python
    with tutelx.monitor.Monitor(model, jsonl="run.jsonl", tensorboard="runs/1") as monitor:
        for batch in batches:
            ...                     # forward, backward, optimizer
            monitor.step()
    ```

    While it is open every call of a layer is timed. `step` reads the loads of layers that have run: on an accelerator
    it waits for the device then, once a layer, in the steps that are written; other steps wait for nothing.

    JSON Lines, one object a line, appended and flushed after each step; a number that is unknown is null:
        schema: 1. time: seconds since 1970. step. rank: who writes. layer: its name in the model.
        plan, source, reason, exchange: as in `Decision`; the tier is the source.
        tokens, top_k: of the call. capacity: rows an expert may receive.
        predicted_seconds, measured_seconds: what the planner expects, and what its record says.
        seconds: what the call took, from its plan to its end and in training its backward, without the gate.
        needed_capacity_factor: the least that drops nothing. dropped, drop_rate: slots of all ranks without a row.
        load: slots that asked for each expert, of all ranks, before any drop.
        bytes_tokens, bytes_weights: that this rank has sent to others for the call, backward included.
    TensorBoard has the numbers under the layer's name, the fullest expert over the mean, and the plan where it changes.

    Args:
        model: whose layers: `MoE`, wrapped ones, and experts of transformers.
        jsonl: a file, made if it is not there.
        tensorboard: a folder, for `torch.utils.tensorboard`.
        every: steps from one line to the next.
        all_ranks: every rank writes, into files and folders with ".rank3" before the suffix. Otherwise rank 0 of the
            default group alone does; the loads are those of all ranks anyway.

    Raises:
        InvalidTypeError: `model` is no module. InvalidValueError: `every` is below 1, or nothing is to be written.
        ImportError: TensorBoard is asked for and not installed.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        jsonl: str | Path | None = None,
        tensorboard: str | Path | None = None,
        every: int = 1,
        all_ranks: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise InvalidTypeError(f"model is {type(model).__name__}, expected torch.nn.Module")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise InvalidValueError(f"every={every!r} must be an int of at least 1")
        if jsonl is None and tensorboard is None:
            raise InvalidValueError("jsonl and tensorboard are both None: there is nothing to write to")
        self.rank = _rank()
        self._writes = all_ranks or self.rank == 0
        self._every, self._model = every, model
        self._steps = 0
        self._seen: dict[str, Decision] = {}
        self._plans: dict[str, str] = {}
        self._open = ExitStack()
        self._lines: IO[str] | None = None
        self._board: SummaryWriter | None = None
        try:
            self._open_files(*(None if p is None else _of_rank(Path(p), all_ranks) for p in (jsonl, tensorboard)))
        except BaseException:
            self._open.close()
            raise

    def _open_files(self, jsonl: Path | None, tensorboard: Path | None) -> None:
        if not self._writes:
            return
        if tensorboard is not None:
            self._board = _summary_writer()(str(tensorboard))
            self._open.callback(self._board.close)
        if jsonl is not None:
            jsonl.parent.mkdir(parents=True, exist_ok=True)
            self._lines = self._open.enter_context(jsonl.open("a", encoding="utf-8"))
        self._open.enter_context(watched())

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self._open.close()
        self._writes = False

    def step(self, number: int | None = None) -> None:
        """After a step. number: its own, else they are counted from 0. Layers that did not run since are left out."""
        number = self._steps if number is None else number
        self._steps = number + 1
        if not self._writes or number % self._every:
            return
        for row in self._rows(number):
            if self._lines is not None:
                self._lines.write(json.dumps(row, allow_nan=False) + "\n")
            if self._board is not None:
                self._draw(self._board, row)
        if self._lines is not None:
            self._lines.flush()

    def _rows(self, step: int) -> Iterator[dict[str, Any]]:
        for name, call in _calls(self._model):
            decision, stats = call.decision, call.stats
            if decision is None or stats is None or self._seen.get(name) is decision:
                continue
            self._seen[name] = decision
            yield {"schema": SCHEMA, "time": time.time(), "step": step, "rank": self.rank, "layer": name, **_row(call)}

    def _draw(self, board: SummaryWriter, row: dict[str, Any]) -> None:
        layer, step = row["layer"] or "model", row["step"]
        for name in (*_SCALARS, *_BYTES):
            if row[name] is not None:
                board.add_scalar(f"{layer}/{name}", row[name], step)
        load = row["load"]
        if sum(load):
            board.add_scalar(f"{layer}/load_max_over_mean", max(load) * len(load) / sum(load), step)
        if self._plans.get(layer) != row["plan"]:
            self._plans[layer] = row["plan"]
            board.add_text(f"{layer}/plan", f"{row['plan']} ({row['source']}): {row['reason']}", step)


class _Call(Protocol):
    @property
    def decision(self) -> Decision | None: ...
    @property
    def stats(self) -> RoutingStats | None: ...
    @property
    def watch(self) -> Stopwatch | None: ...


def _calls(model: nn.Module) -> Iterator[tuple[str, _Call]]:
    """The last call of every layer, by name."""
    find: Callable[[nn.Module], Any] | None = None
    if "tutelx.integrations.transformers" in sys.modules:  # else no model of transformers can have been wrapped
        from tutelx.integrations.transformers import setting_of as find
    for name, module in model.named_modules():
        if isinstance(module, MoEBase):
            yield name, module._last
        elif find is not None and (setting := find(module)) is not None:
            yield name, setting


def _row(call: Any) -> dict[str, Any]:
    decision, stats, watch = call.decision, call.stats, call.watch
    load = stats.load_over_ranks.sum(dim=0).tolist()
    asked, received = sum(load), int(stats.received_over_ranks.sum())
    settle()  # the device has just been waited for
    workload = decision.workload
    slots = workload.tokens * workload.top_k
    fullest = int(stats.load_over_ranks.max()) if load else 0
    row: dict[str, Any] = {
        "plan": str(decision.plan),
        "source": decision.source,
        "reason": decision.reason,
        "exchange": decision.exchange,
        "tokens": workload.tokens,
        "top_k": workload.top_k,
        "capacity": workload.capacity,
        "predicted_seconds": decision.predicted_seconds,
        "measured_seconds": decision.measured_seconds,
        "seconds": None if watch is None else watch.seconds,
        "needed_capacity_factor": fullest * workload.num_experts / slots if slots else 0.0,
        "dropped": asked - received,
        "drop_rate": (asked - received) / asked if asked else 0.0,
        "load": load,
        "bytes_tokens": stats.bytes_tokens,
        "bytes_weights": stats.bytes_weights,
    }
    return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in row.items()}


def _rank() -> int:
    distributed = torch.distributed
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


def _of_rank(path: Path, all_ranks: bool) -> Path:
    return path.with_name(f"{path.stem}.rank{_rank()}{path.suffix}") if all_ranks else path


def _summary_writer() -> type[SummaryWriter]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(f"tensorboard= needs the package tensorboard (pip install tensorboard): {error}") from error
    return SummaryWriter
