"""`tutelx tune --ranks N`: the same command N times on this machine, as torchrun would start it."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from tutelx import env
from tutelx.cli import FAILURE, INTERRUPTED

_GRACE = 15.0  # seconds that the other ranks have to notice that one has failed
_POLL = 0.05


def launch(ranks: int, argv: Sequence[str]) -> int:
    """argv: of the command, as each rank gets it.

    Returns:
        The exit code of the first rank that fails, 0 if none does, 130 after Ctrl-C.

    Ctrl-C is handed on to the ranks, which stop together; a second one, a second later, ends them.
    """
    port = _free_port()
    command = [sys.executable, "-m", "tutelx", *argv]
    came: list[float] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(time.monotonic()))
    processes: list[subprocess.Popen] = []
    try:
        for rank in range(ranks):
            processes.append(subprocess.Popen(command, env=env.rank_environment(rank, ranks, port)))
        return _wait(processes, came)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        signal.signal(signal.SIGINT, before)


def _wait(processes: list[subprocess.Popen], came: list[float]) -> int:
    told, first, deadline = 0, 0, float("inf")
    while any(process.poll() is None for process in processes):
        if len(came) > told:
            if came[-1] - came[0] > 1:
                return INTERRUPTED
            for process in processes:
                process.send_signal(signal.SIGINT)
            told = len(came)
        failed = [process.returncode for process in processes if process.returncode]
        if failed and not first:
            first, deadline = failed[0], time.monotonic() + _GRACE
        if time.monotonic() > deadline:
            break
        time.sleep(_POLL)
    codes = [process.returncode for process in processes if process.returncode]
    code = first or (codes[0] if codes else 0)
    return INTERRUPTED if came else code if code >= 0 else FAILURE


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
