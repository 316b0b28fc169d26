"""What the numbers were measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

import tutelx
from tutelx.machine import caches, cpu_name

_MEMORY = Path("/proc/meminfo")
# Where the system does not tell (containers, macOS): larger than the last-level cache of a laptop.
FALLBACK_CACHE = 32 * 2**20
FALLBACK_MEMORY = 4 * 2**30


def last_level_cache(device: torch.device) -> int:
    """Bytes of the largest cache between the device and its memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    return max(caches().values(), default=FALLBACK_CACHE)


def available_memory(device: torch.device) -> int:
    if device.type == "cuda":
        # What torch holds in reserve is free as well.
        reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserve
    return _meminfo("MemAvailable") or FALLBACK_MEMORY


def describe(device: torch.device, *, threads: int | None = None) -> dict[str, Any]:
    """threads: those the run used, where they were not torch's own choice."""
    machine = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads or torch.get_num_threads(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "caches": caches(),
        "memory": _meminfo("MemTotal"),
        "device": device.type,
        "device_name": cpu_name() if device.type == "cpu" else torch.cuda.get_device_name(device),
        "last_level_cache": last_level_cache(device),
        "torch": torch.__version__,
        "tutelx": tutelx.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine |= {
            "device_memory": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
        }
    return machine


def _meminfo(name: str) -> int | None:
    try:
        for line in _MEMORY.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 2**10
    except (OSError, ValueError, IndexError):
        pass
    return None
