"""Who is lost: after an exchange has failed, the ranks that still can say so, and the others are named.

A rank sees only that somebody's rows do not come, and that may be a rank that itself gave up on another. So whoever
fails leaves a report in the store that the ranks met in, breaks off its connections, so that nobody waits for it any
longer, and then looks for the reports of the others. Without a failure nothing of this runs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from threading import Thread

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from tutelx.comm.mesh import Mesh
from tutelx.comm.subgroups import timeout_of
from tutelx.errors import RankFailedError

_GRACE = 5.0  # seconds, or the group's timeout if less, that a report may come after the others
_PAUSES = 0.01, 1.0  # seconds between two looks, growing from the first to the second
_TAG = 0x7479
_TEXT = 2000  # bytes of an error

_calls: dict[str, int] = {}


def number_of_calls(mesh: Mesh) -> int:
    """How many calls the ranks of the group have agreed on, as far as this rank knows."""
    return _calls.get(mesh.group.group_name, 0)


def count_calls(mesh: Mesh, number: int) -> None:
    """From now on :func:`number_of_calls` is `number`, which all ranks have agreed on."""
    _calls[mesh.group.group_name] = number


@contextmanager
def named_losses(mesh: Mesh, number: int, groups: Sequence[dist.ProcessGroup]) -> Iterator[None]:
    """What runs in here talks to the other ranks; if that fails, the error names those that are lost.

    Takes at most the group's timeout more than the failure itself, and `_GRACE`; much less where connections broke.

    Args:
        number: of the call, the same on all ranks.
        groups: that it talks in.
    """
    begin = time.monotonic()
    try:
        yield
    except RankFailedError as error:
        reasons = _reasons(mesh, number, groups, begin)
        if not reasons:
            raise
        raise RankFailedError("; ".join([*reasons, str(error)])) from error
    except Exception as error:
        report(mesh, number, f"{type(error).__name__}: {error}")
        raise


def report(mesh: Mesh, number: int, failure: str = "") -> None:
    """Tells the others that this rank is alive and has left call `number`. failure: its own, if it has one."""
    if mesh.world > 1:
        _bounded(lambda: _publish(mesh, number, failure), _grace(mesh))


def reported(mesh: Mesh, number: int) -> dict[int, str]:
    """The ranks that have left call `number` or a later one alive, and their own failures."""
    reports: dict[int, str] = {}
    _bounded(lambda: _read(mesh, number, set(range(mesh.world)), reports), _grace(mesh))
    return reports


@dataclass
class _Found:
    """reports: as :func:`reported`. broken: ranks whose connection was closed. reached: the store has answered."""

    reports: dict[int, str] = field(default_factory=dict)
    broken: set[int] = field(default_factory=set)
    reached: bool = False


def _reasons(mesh: Mesh, number: int, groups: Sequence[dist.ProcessGroup], begin: float) -> list[str]:
    now, found = time.monotonic(), _Found()
    last = max(now, begin + timeout_of(mesh.group).total_seconds()) + _grace(mesh)
    _bounded(lambda: _look(mesh, number, groups, last, found), last + _grace(mesh) - now)
    others = set(range(mesh.world)) - {mesh.rank}
    if not found.reached:
        # Once this rank gave up waiting all its connections are closed, which tells nothing of anybody.
        told = found.broken if found.broken < others or mesh.world == 2 else set()
        return [f"rank {rank} has closed its connection" for rank in sorted(told)]
    failures = [f"rank {rank} failed in the call: {why}" for rank, why in sorted(found.reports.items()) if why]
    silent = others - found.reports.keys()
    # A rank that had all it needed may have finished the call: where connections broke, only their ranks are lost.
    lost = sorted(silent & found.broken or silent)
    return failures + [f"rank {rank} died, hangs or is late: the others have left the call" for rank in lost]


def _look(mesh: Mesh, number: int, groups: Sequence[dist.ProcessGroup], last: float, found: _Found) -> None:
    others = set(range(mesh.world)) - {mesh.rank}
    if _is_gloo(mesh.group):
        found.broken = {rank for group in groups for rank in _broken(mesh, group)}
    _publish(mesh, number, "")
    found.reached = True
    for group in groups:
        _break_off(group)
    soon, pause = time.monotonic() + _grace(mesh), _PAUSES[0]
    while True:
        _read(mesh, number, others, found.reports)
        silent = others - found.reports.keys()
        # Who closed a connection has died or is about to report; without one that did, somebody may still wait.
        gone = silent & found.broken or not _is_gloo(mesh.group)
        if not silent or time.monotonic() > (soon if gone else last):
            return
        time.sleep(pause)
        pause = min(2 * pause, _PAUSES[1])


def _key(mesh: Mesh, rank: int) -> str:
    return f"tutelx/left/{mesh.group.group_name}/{rank}"


def _publish(mesh: Mesh, number: int, failure: str) -> None:
    text = f"{number} {failure}".encode()[:_TEXT]
    c10d._get_default_store().set(_key(mesh, mesh.rank), text.decode(errors="ignore"))


def _read(mesh: Mesh, number: int, ranks: set[int], reports: dict[int, str]) -> None:
    store = c10d._get_default_store()
    for rank in sorted(ranks - reports.keys()):
        if store.check([_key(mesh, rank)]):
            left, _, failure = store.get(_key(mesh, rank)).decode(errors="replace").partition(" ")
            if int(left) >= number:
                reports[rank] = failure


def _is_gloo(group: dist.ProcessGroup) -> bool:
    return "cpu:gloo" in dist.get_backend_config(group)


def _broken(mesh: Mesh, group: dist.ProcessGroup) -> set[int]:
    """The ranks, as the mesh counts them, whose connection in `group` is closed."""
    peers = {rank: dist.get_global_rank(group, rank) for rank in range(group.size()) if rank != group.rank()}
    return {dist.get_group_rank(mesh.group, known) for rank, known in peers.items() if _is_broken(group, rank)}


def _is_broken(group: dist.ProcessGroup, rank: int) -> bool:
    """Gloo refuses at once to send where the other end was closed; else nobody receives what is sent here."""
    try:
        group.send([torch.zeros(1)], rank, _TAG)
    except RuntimeError:
        return True
    return False


def _break_off(group: dist.ProcessGroup) -> None:
    """Closes this rank's connections: gloo does so when a receive is late."""
    if not _is_gloo(group):
        return
    for rank in range(group.size()):
        if rank != group.rank():
            with suppress(RuntimeError):
                group.recv([torch.zeros(1)], rank, _TAG).wait(timedelta(milliseconds=1))


def _grace(mesh: Mesh) -> float:
    return min(_GRACE, timeout_of(mesh.group).total_seconds())


def _bounded(function, seconds: float) -> None:
    """Runs it to its end, its error or `seconds`: a store whose host is gone may fail, or never answer."""

    def quietly() -> None:
        with suppress(Exception):
            function()

    thread = Thread(target=quietly, daemon=True)
    thread.start()
    thread.join(seconds)
