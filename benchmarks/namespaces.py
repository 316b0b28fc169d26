"""Network namespaces, whose names carry the id of the process they serve, and shaped links, by iproute2."""

from __future__ import annotations

import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tutelx.errors import InvalidValueError, TutelxError

PREFIX = "tutelx"
_UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}


class ClusterUnavailable(TutelxError, RuntimeError):
    """This machine or this user cannot build an emulated cluster; the message says what is missing."""


@dataclass(frozen=True, kw_only=True)
class Link:
    """What joins a node to the switch, in each direction.

    rate: such as "200mbit" (kbit, mbit or gbit a second); None leaves it as fast as memory is.
    delay_ms: milliseconds from node to node, one way.
    message_us: microseconds of link time that every packet costs on top of its bytes; needs a rate. What TCP hands
        down at once, up to 64 KiB, is one packet here.
    """

    rate: str | None = None
    delay_ms: float = 0.0
    message_us: float = 0.0

    def __post_init__(self) -> None:
        if self.rate is not None and not re.fullmatch(r"\d+(\.\d+)?([kmg])bit", self.rate):
            raise InvalidValueError(f"rate={self.rate!r} is no rate such as '200mbit' or '1gbit'")
        for name in ("delay_ms", "message_us"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise InvalidValueError(f"{name}={value} must be finite and not negative")
        if self.rate is not None and self.bits_per_second < 1e4:
            raise InvalidValueError(f"rate={self.rate!r} is below 10kbit")
        if self.message_us and self.rate is None:
            raise InvalidValueError(f"message_us={self.message_us} is charged as link time, but rate=None has no limit")

    @property
    def bits_per_second(self) -> float | None:
        return None if self.rate is None else float(self.rate[:-4]) * _UNITS[self.rate[-4:]]

    def shaping(self) -> list[str]:
        """The arguments of `tc qdisc add dev DEVICE root`; empty if there is nothing to shape."""
        rate = self.bits_per_second
        if rate is None:
            return []
        # The bucket holds a packet of the largest size, which would else be cut up at the cost of the processor, and a
        # millisecond, below which timers are too coarse.
        overhead = round(self.message_us * 1e-6 * rate / 8)
        burst = max(72 * 1024, round(rate / 8 * 1e-3)) + overhead
        # The queue holds half a second: TCP's windows limit what waits, and losses would measure its recovery instead.
        queue = ["limit", str(burst + round(rate / 8 * 0.5))]
        return ["tbf", "rate", f"{round(rate)}bit", "burst", str(burst), *queue, "overhead", str(overhead)]


def why_unavailable() -> str | None:
    """What this machine or user lacks for a cluster; None if one can be built."""
    if not sys.platform.startswith("linux"):
        return f"network namespaces need Linux, this is {sys.platform}"
    if os.geteuid() != 0:
        return f"network namespaces need root, this is user {os.geteuid()}"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"iproute2 is needed: {' and '.join(missing)} not found"
    probe = f"{PREFIX}{os.getpid()}.probe"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    subprocess.run(["ip", "netns", "del", probe], capture_output=True, check=False)
    return None if made.returncode == 0 else f"ip netns add: {made.stderr.strip()}"


def remove_stale() -> None:
    """Removes the namespaces of clusters whose process is gone."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False).stdout
    for name in (line.split()[0] for line in listed.splitlines() if line):
        owner = re.fullmatch(rf"{PREFIX}(\d+)\.\w+(\.\w+)?", name)
        if owner and not Path(f"/proc/{owner[1]}").exists():
            end_all(name)
            remove(name)


def end_all(namespace: str) -> None:
    """Asks everything inside to end, and kills what has not after five seconds."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        end = time.monotonic() + 5
        asked: set[int] = set()
        while (pids := _pids(namespace)) and time.monotonic() < end:
            for pid in pids - asked:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
            asked |= pids
            time.sleep(0.02)


def _pids(namespace: str) -> set[int]:
    listed = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=False)
    return {int(pid) for pid in listed.stdout.split()}


def remove(namespace: str) -> None:
    subprocess.run(["ip", "netns", "del", namespace], capture_output=True, check=False)


def call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ClusterUnavailable(f"{' '.join(command)}: {done.stderr.strip()}")
