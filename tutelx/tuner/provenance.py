"""What a record says of how it came about."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import PurePath


def provenance(
    *,
    command: str | None,
    margin: float | None,
    seconds: float,
    samples: int,
    load: float | None,
    throttled: str,
    discarded: int,
) -> dict[str, str]:
    """margin: with which plans were pruned, None if they were not. seconds: that everything took.

    samples: timed turns of all plans. load: :func:`load_average` before. throttled: what slowed a device down.
    discarded: turns that were repeated for it.
    """
    found = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command_line() if command is None else command,
        "seconds": f"{seconds:.1f}",
        "samples": str(samples),
        "throttled": throttled,
    }
    if margin is not None:
        found["margin"] = f"{margin:g}"
    if discarded:
        found["discarded"] = f"{discarded} turns"
    if load is not None:
        found["load"] = f"{load:.2f}"
    return found


def command_line(argv: Sequence[str] | None = None) -> str:
    """What was typed behind "tutelx", or is this process's own, without the folders of this machine."""
    words = [PurePath(sys.argv[0]).name, *sys.argv[1:]] if argv is None else ["tutelx", *argv]
    return shlex.join(PurePath(word).name if PurePath(word).is_absolute() else word for word in words)


def load_average() -> float | None:
    """Processes that want a core, over the last minute; None where the system does not tell."""
    try:
        return os.getloadavg()[0]
    except (OSError, AttributeError):
        return None
