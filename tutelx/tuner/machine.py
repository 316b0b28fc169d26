"""The machine that is measured: its fingerprint, its clock, and whether it is throttled right now."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

import tutelx
from tutelx.tuning.hardware import Hardware


@dataclass(frozen=True, kw_only=True)
class Machine:
    hardware: Hardware
    software: dict[str, str]
    device: torch.device

    @classmethod
    def here(cls, device: torch.device, group: dist.ProcessGroup | None = None) -> Machine:
        raise NotImplementedError

    @property
    def tells_throttling(self) -> bool:
        return False

    def throttled(self) -> bool:
        return False

    def reasons(self) -> str:
        return ""

    def timed(self, call: Callable[[], Any]) -> float:
        """Seconds until the call's work is done on this rank's device."""
        begin = time.perf_counter()
        call()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - begin


def software(device: torch.device) -> dict[str, str]:
    """Versions that a measurement depends on."""
    found = {"tutelx": tutelx.__version__, "torch": torch.__version__, "python": platform.python_version()}
    if device.type == "cuda" and torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found
