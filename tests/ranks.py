"""Worlds of gloo ranks that live as long as the test session: a job is a function that every rank runs.

A world is started once, from a server that has torch loaded already; a job then costs milliseconds. A rank that
raises makes `run` raise, a rank that hangs is killed with its world, and the next job finds a new one.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

GRACE = 5.0  # seconds that the other ranks have once a rank raised or died
_DUMP_STACK = signal.SIGUSR1
_PRELOAD = ["torch", "torch.distributed", "torch.distributed.device_mesh", "torch.distributed.tensor"]


class RankError(RuntimeError):
    """What stands behind the exception of a rank: every rank's traceback."""


class RankTimeout(RuntimeError):
    """Ranks that did not finish in time."""


class Ranks:
    """A world of `world` gloo ranks with one torch thread each.

    timeout: seconds after which gloo gives up waiting for another rank.
    """

    def __init__(self, world: int, *, timeout: float = 180.0) -> None:
        self.world, self.timeout = world, timeout
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(
        self,
        job: Callable[..., Any],
        *args: Any,
        ranks: Sequence[int] | None = None,
        timeout: float = 240.0,
        dying: Sequence[int] = (),
    ) -> list[Any]:
        """job(group, *args) on every rank; what each returned, in the order of the group's ranks.

        Args:
            job: a function that pickle finds, in a module that the workers can import.
            ranks: the group's members, ascending; the others only help to make the group. Default: the world.
            timeout: seconds for the whole job.
            dying: ranks of the world that are meant to die; their result is None, and the world ends with the job.

        Raises:
            RankTimeout: a rank did not finish; the message names it, and its stack stands on stderr.
            Exception: the lowest rank's own exception, caused by a RankError that holds every traceback.
        """
        self._start()
        members = tuple(range(self.world)) if ranks is None else tuple(ranks)
        message = pickle.dumps((job, args, None if ranks is None else members))
        for pipe in self._pipes:
            pipe.send_bytes(message)
        answers = self._collect(timeout, set(dying))
        failed = {rank: answer for rank, answer in answers.items() if isinstance(answer, _Failure)}
        if failed or dying:
            self.stop()
        if failed:
            first = failed[min(failed)]
            text = "\n".join(f"rank {rank}:\n{failed[rank].text}" for rank in sorted(failed))
            raise first.error from RankError(text)
        return [answers.get(rank) for rank in members]

    def stop(self) -> None:
        """Kills the ranks; a later `run` starts new ones."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        if self._processes:
            return
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOAD)
        handle, path = tempfile.mkstemp(prefix="tutelx-ranks-")
        os.close(handle)
        os.unlink(path)
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self.world, path, self.timeout, theirs), daemon=True, name=f"rank {rank}"
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def _collect(self, timeout: float, dying: set[int]) -> dict[int, Any]:
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + timeout
        waiting = {rank: self._pipes[rank] for rank in range(self.world)}
        while waiting:
            ready = wait(list(waiting.values()), max(0.0, deadline - time.monotonic()))
            if not ready:
                self._give_up(sorted(waiting), answers, timeout)
            for rank in [rank for rank, pipe in waiting.items() if pipe in ready]:
                try:
                    answers[rank] = pickle.loads(waiting[rank].recv_bytes())
                except EOFError:
                    self._processes[rank].join()
                    if rank not in dying:
                        code = self._processes[rank].exitcode
                        answers[rank] = _Failure(RankError(f"rank {rank} died with exit code {code}"), "")
                del waiting[rank]
                if isinstance(answers.get(rank), _Failure):
                    deadline = min(deadline, time.monotonic() + GRACE)
        return answers

    def _give_up(self, late: list[int], answers: dict[int, Any], timeout: float) -> None:
        for rank in late:
            os.kill(self._processes[rank].pid, _DUMP_STACK)
        time.sleep(0.2)  # the stacks are written by the ranks themselves
        self.stop()
        failed = [f"rank {rank}:\n{a.text}" for rank, a in sorted(answers.items()) if isinstance(a, _Failure)]
        if failed:
            raise RankError(f"ranks {late} hang after others failed:\n" + "\n".join(failed))
        raise RankTimeout(f"ranks {late} of {self.world} did not finish within {timeout} s")


class _Failure:
    """A rank's exception and its traceback, as text."""

    def __init__(self, error: BaseException, text: str) -> None:
        self.error, self.text = error, text


def _serve(rank: int, world: int, path: str, timeout: float, pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    faulthandler.register(_DUMP_STACK)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = dist.FileStore(path, world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=timeout))
    groups: dict[tuple[int, ...] | None, Any] = {None: dist.group.WORLD}
    while True:
        try:
            message = pipe.recv_bytes()
        except (EOFError, OSError):
            os._exit(0)
        try:
            job, args, ranks = pickle.loads(message)
            if ranks not in groups:
                groups[ranks] = dist.new_group(list(ranks), timeout=timedelta(seconds=timeout))
            torch.manual_seed(0)
            answer = job(groups[ranks], *args) if ranks is None or rank in ranks else None
        except BaseException as error:
            answer = _Failure(_picklable(error), traceback.format_exc())
        pipe.send_bytes(pickle.dumps(answer))


def _picklable(error: BaseException) -> BaseException:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RankError(f"{type(error).__name__}: {error}")
    return error
