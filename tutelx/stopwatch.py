"""How long the calls of a layer take, for planners that ask, and their names in a profiler's trace."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch

from tutelx.types import Decision, Plan, Planner

if TYPE_CHECKING:
    Mark = float | torch.cuda.Event

_NOTHING = nullcontext()
_lock = Lock()
_late: deque[Stopwatch] = deque()  # whose marks a device may not have reached yet
_watchers = 0  # who want every call timed


class Stopwatch:
    """Times one call: from its plan to its end, and if it trains from the gradient of y to that of the rows' tokens.

    On an accelerator the times are those of its stream. They are read when later calls find them done: nobody waits.

    seconds: None as long as they are not known.
    """

    __slots__ = ("_decision", "_device", "_marks", "_planner", "_whole", "seconds")

    def __init__(self, planner: Planner, decision: Decision, device: torch.device) -> None:
        settle()
        self.seconds: float | None = None
        self._planner, self._decision, self._device = planner, decision, device
        self._marks: list[Mark] = [_mark(device)]
        self._whole = 2

    def begin(self, x: torch.Tensor) -> torch.Tensor:
        """x itself, in a place of its own in the graph, which its gradient reaches last."""
        if torch.is_grad_enabled() and x.requires_grad:
            x = x.view_as(x)
            x.register_hook(self._backward_ends)
            self._whole = 4
        return x

    def end(self, y: torch.Tensor) -> None:
        """The forward is done, or on its way."""
        self._marks.append(_mark(self._device))
        if torch.is_grad_enabled():
            if y.requires_grad:
                y.register_hook(self._backward_begins)
            else:
                self._tell(None)
        if self._whole == 2 or not y.requires_grad:
            self._report()

    def _backward_begins(self, grad: torch.Tensor) -> None:
        if len(self._marks) == 2:  # a graph may be gone through more than once
            self._marks.append(_mark(self._device))
            self._tell(None)

    def _backward_ends(self, grad: torch.Tensor) -> None:
        if len(self._marks) == 3:
            self._marks.append(_mark(self._device))
            self._report()

    def _report(self) -> None:
        _late.append(self)
        settle()

    def is_known(self, *, wait: bool) -> bool:
        """Whether the device has reached the last mark. wait: until it has."""
        last = self._marks[-1]
        if isinstance(last, float):
            return True
        if wait:
            last.synchronize()
        return last.query()

    def read(self) -> None:
        marks = self._marks[: self._whole]
        self.seconds = sum(_seconds(a, b) for a, b in zip(marks[::2], marks[1::2]))
        self._tell(self.seconds)

    def _tell(self, seconds: float | None) -> None:
        if getattr(self._planner, "wants_time", False):
            self._planner.observe(self._decision, seconds)  # type: ignore[attr-defined]


def stopwatch(planner: Planner, decision: Decision, device: torch.device) -> Stopwatch | None:
    """One that runs, if the planner or a watcher wants times and this call is none that is made again or captured."""
    if not (_watchers or getattr(planner, "wants_time", False)) or torch.compiler.is_compiling():
        return None
    if in_backward() or is_captured(device.type):
        return None
    return Stopwatch(planner, decision, device)


def are_timed() -> bool:
    """Whether a watcher wants every call timed."""
    return _watchers > 0


@contextmanager
def watched() -> Iterator[None]:
    """As long as it is open every call is timed, whatever its planner wants."""
    global _watchers
    with _lock:
        _watchers += 1
    try:
        yield
    finally:
        with _lock:
            _watchers -= 1


def in_backward() -> bool:
    """Whether the caller runs inside a backward pass: what is called there again is a recomputation."""
    return torch._C._current_graph_task_id() != -1


def is_captured(device: str) -> bool:
    """Whether the current stream's work goes into a CUDA graph, where nothing can be waited for."""
    return device == "cuda" and torch.cuda.is_current_stream_capturing()


def settle(*, wait: bool = False) -> None:
    """Tells the planners the times that are known by now. wait: for the device, so that all are."""
    while _late:
        with _lock:  # the backward may run in a thread of its own
            if not _late:
                return
            first = _late[0]
            if not first.is_known(wait=wait):
                return
            _late.popleft()
        first.read()


def named(plan: Plan) -> AbstractContextManager[Any]:
    """A range of this name in the trace of a profiler, if one is running."""
    if torch.compiler.is_compiling() or not torch.autograd._profiler_enabled():
        return _NOTHING
    return torch.profiler.record_function(f"tutelx {plan}")


def _mark(device: torch.device) -> Mark:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _seconds(begin: Any, end: Any) -> float:
    return end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1e3
