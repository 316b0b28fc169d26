"""Ranks that meet once, to start from the same knowledge: what a planner's `join` is given."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from tutelx.comm.agreement import MOST_NUMBERS, Value, announced_failure, compare, gather_numbers
from tutelx.comm.failures import named_losses, number_of_calls
from tutelx.comm.mesh import Mesh
from tutelx.errors import InvalidValueError, RankFailedError
from tutelx.types import Planner


class Meeting:
    """The ranks of one group. Every method must be called by all of them, in the same order.

    All raise RankFailedError if a rank does not come or told that it failed, and RankMismatchError if one calls
    something else.
    """

    def __init__(self, mesh: Mesh, device: torch.device) -> None:
        self._mesh, self._device = mesh, device

    @property
    def rank(self) -> int:
        return self._mesh.rank

    @property
    def mesh(self) -> Mesh:
        return self._mesh

    @property
    def device(self) -> torch.device:
        return self._device

    def failures(self) -> AbstractContextManager[None]:
        """What fails in here is told to the others, in what they call next."""
        return announced_failure(self._mesh, self._device)

    @contextmanager
    def losses(self) -> Iterator[None]:
        """For what talks to the other ranks by itself: its error names those that are lost."""
        with named_losses(self._mesh, number_of_calls(self._mesh), (self._mesh.group,)):
            try:
                yield
            except RuntimeError as error:
                raise RankFailedError(f"the ranks do not meet: {error}") from error

    def compare(self, **values: Value) -> None:
        """Makes sure that all ranks have the same values, texts of up to 24 bytes; RankMismatchError names both."""
        compare(self._mesh, values, self._device)

    def share(self, make: Callable[[], bytes]) -> bytes:
        """What `make` gives on rank 0, the only one that calls it."""
        data = b""
        if self.rank == 0:
            with self.failures():
                data = make()
        size = int(self.greatest([float(len(data))])[0])
        if not size:
            return b""
        message = torch.frombuffer(bytearray(data), dtype=torch.uint8) if self.rank == 0 else torch.empty(size).byte()
        message = message.to(self._device)
        with self.losses():
            dist.broadcast(message, dist.get_global_rank(self._mesh.group, 0), group=self._mesh.group)
        return message.cpu().numpy().tobytes()

    def greatest(self, values: Sequence[float]) -> list[float]:
        """Of each number the greatest of all ranks; NaN if one has NaN.

        Raises:
            InvalidValueError: more than MOST_NUMBERS.
        """
        if len(values) > MOST_NUMBERS:
            raise InvalidValueError(f"{len(values)} numbers are more than {MOST_NUMBERS}")
        words = struct.unpack(f"<{len(values)}q", struct.pack(f"<{len(values)}d", *values))
        table = gather_numbers(self._mesh, words, self._device)
        return table.view(torch.float64).amax(dim=0).tolist()


_Known = WeakKeyDictionary[Planner, tuple[Planner, int]]
_joined: WeakKeyDictionary[dist.ProcessGroup, _Known] = WeakKeyDictionary()


def joins(planner: Planner) -> bool:
    """Whether the planner wants the ranks to meet before it plans for them."""
    return hasattr(planner, "join") and getattr(planner, "always", None) is None


def joined(planner: Planner, mesh: Mesh) -> Planner:
    """Who plans for the group: what `join` has returned; the planner itself if it has not met or does not join."""
    return _standing(planner, mesh)[0] if joins(planner) else planner


def meet(planner: Planner, mesh: Mesh, device: torch.device) -> Planner:
    """As :func:`joined`; the first time for a group, all ranks join."""
    if not joins(planner):
        return planner
    found, number = _standing(planner, mesh)
    if not number:
        join: Any = planner.join  # type: ignore[attr-defined]
        found = join(Meeting(mesh, device))
        _joined.setdefault(mesh.group, WeakKeyDictionary())[planner] = found, number_of_calls(mesh)
    return found


def standing(planner: Planner, mesh: Mesh) -> str:
    """What must be equal on all ranks of how a planner comes to a plan, in at most 24 bytes."""
    if not joins(planner):
        return "same on all ranks" if getattr(planner, "same_on_all_ranks", False) else "compared on every call"
    number = _standing(planner, mesh)[1]
    return f"{type(planner).__name__[:12]} " + (f"since {number}" if number else "new")


def _standing(planner: Planner, mesh: Mesh) -> tuple[Planner, int]:
    """Who plans for the group, and since which call; 0: the ranks have not met."""
    known = _joined.get(mesh.group)
    return (planner, 0) if known is None else known.get(planner, (planner, 0))
