"""The machine that is measured: its fingerprint, its clock, and whether it is throttled right now."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import tutelx
from tutelx.bench.machine import last_level_cache
from tutelx.machine import cpu_name, memory_bytes
from tutelx.tuner.together import Together
from tutelx.tuning.hardware import Hardware

# The widest first, by the names that Linux gives them.
_MATRIX_UNITS = {"amx_tile": "amx", "avx512_bf16": "avx512_bf16", "avx512f": "avx512", "avx2": "avx2", "asimd": "neon"}
_COPIED, _COPIES = 4, 7  # caches that a copy is large; copies, of which the fastest counts


@dataclass(frozen=True, kw_only=True)
class Machine:
    """hardware, software: what records are filed under. device: of this rank."""

    hardware: Hardware
    software: dict[str, str]
    device: torch.device

    @classmethod
    def here(cls, device: torch.device, group: dist.ProcessGroup | None = None) -> Machine:
        """Measures the memory's rate, on rank 0. Over ranks all must call."""
        together = Together(group, device)
        cache = last_level_cache(device)
        rate = memory_rate(device, cache) if together.rank == 0 else 0.0
        [rate] = together.first([rate])
        if device.type == "cuda":
            about = torch.cuda.get_device_properties(device)
            hardware = Hardware(
                device="cuda",
                arch=f"sm_{about.major}{about.minor}",
                units=about.multi_processor_count,
                memory_bytes=about.total_memory,
                memory_rate=rate,
                cache_bytes=cache,
                aliases={"name": about.name},
            )
        else:
            hardware = Hardware(
                device="cpu",
                arch=platform.machine().lower() or "unknown",
                units=usable_cores(),
                memory_bytes=memory_bytes() or 0,
                memory_rate=rate,
                cache_bytes=cache,
                matrix_unit=matrix_unit(),
                aliases={"name": cpu_name()},
            )
        return cls(hardware=hardware, software=software(device), device=device)

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


def usable_cores() -> int:
    """Cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        return os.cpu_count() or 1


def matrix_unit(path: Path = Path("/proc/cpuinfo")) -> str:
    """The widest unit that multiplies matrices or vectors; "" where the system does not tell."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        return ""
    flags = set(" ".join(re.findall(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)).split())
    return next((name for flag, name in _MATRIX_UNITS.items() if flag in flags), "")


def memory_rate(device: torch.device, cache: int) -> float:
    """GB/s, read and written, of a copy that no cache holds, with all cores."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(usable_cores())
        source = torch.ones(_COPIED * cache // 4, device=device)
        target, best = torch.empty_like(source), float("inf")
        for _ in range(_COPIES):
            begin = time.perf_counter()
            target.copy_(source)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = min(best, time.perf_counter() - begin)
    finally:
        torch.set_num_threads(before)
    return round(2 * source.numel() * source.element_size() / best / 1e9, 2)
