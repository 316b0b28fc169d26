"""What this machine is: read from the system and, for rates, measured."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from tutelx import machine
from tutelx.tuning import nvml
from tutelx.tuning.hardware import Hardware

# Of /proc/cpuinfo, the fastest first.
_MATRIX_UNITS = {
    "amx": "amx_tile",
    "avx512_bf16": "avx512_bf16",
    "avx512": "avx512f",
    "avx2": "avx2",
    "neon": "asimd",
}
REPEATS = 4
_CACHES = 4  # a copy's working set, in caches
_LEAST_BYTES, _MOST_BYTES = 2**26, 2**29
_GPU_BYTES = 2**28
UNKNOWN_CACHE = 2**25
UNKNOWN_MEMORY = 0


def cpu(copy_rate: Callable[[int, int], float] | None = None) -> Hardware:
    """The fingerprint of this process's CPU; takes about a tenth of a second.

    copy_rate: GB/s of copies with a number of threads and of bytes; default: :func:`memory_rate`.
    """
    units, memory = machine.usable_cores(), machine.memory_bytes() or UNKNOWN_MEMORY
    cache = max(machine.caches().values(), default=UNKNOWN_CACHE)
    room = memory // 16 if memory else _MOST_BYTES
    size = min(max(_CACHES * cache, _LEAST_BYTES), _MOST_BYTES, max(room, 2**20))
    return Hardware(
        device="cpu",
        arch=platform.machine() or "unknown",
        units=units,
        memory_bytes=memory,
        memory_rate=round((copy_rate or memory_rate)(units, size), 2),
        cache_bytes=cache,
        matrix_unit=matrix_unit(machine.cpu_flags()),
        aliases={"cpu": machine.cpu_name()},
    )


def matrix_unit(flags: frozenset[str]) -> str:
    """The fastest that the CPU has, by the names of /proc/cpuinfo; "" if none is known."""
    found = next((name for name, flag in _MATRIX_UNITS.items() if flag in flags), "")
    return "neon" if not found and platform.machine() == "arm64" else found


def memory_rate(threads: int, size: int) -> float:
    """GB/s, read and written, of copies by `threads` threads between arrays of `size` bytes together; best of a few.

    Not by torch's threads, of which a process may have fewer than the machine could use.
    """
    part = max(1, size // 2 // threads)
    pairs = [(np.ones(part, np.uint8), np.empty(part, np.uint8)) for _ in range(threads)]

    def copy(pair: tuple[Any, Any]) -> None:
        np.copyto(pair[1], pair[0])  # without the interpreter's lock

    with ThreadPoolExecutor(threads) as pool:
        seconds = []
        for _ in range(REPEATS + 1):  # the first one touches the pages
            begin = time.perf_counter()
            list(pool.map(copy, pairs))
            seconds.append(time.perf_counter() - begin)
    return 2 * part * threads / max(min(seconds[1:]), 1e-9) / 1e9


def cuda(index: int, *, torch: Any = None, card: nvml.Nvml | None = None) -> Hardware:
    """The fingerprint of a card; takes about a tenth of a second. torch, card: what to ask; default: what there is."""
    if torch is None:
        import torch
    properties = torch.cuda.get_device_properties(index)
    card = card or nvml.of_device(torch.device("cuda", index))
    aliases = {"gpu": properties.name, "driver": card.driver()}
    return Hardware(
        device="cuda",
        arch=f"sm_{properties.major}{properties.minor}",
        units=properties.multi_processor_count,
        memory_bytes=properties.total_memory,
        memory_rate=round(_card_rate(torch, index), 1),
        cache_bytes=properties.L2_cache_size,
        aliases={name: value for name, value in aliases.items() if value},
    )


def _card_rate(torch: Any, index: int) -> float:
    """GB/s, read and written, of copies inside the card; best of a few."""
    device = torch.device("cuda", index)
    size = min(_GPU_BYTES, torch.cuda.mem_get_info(device)[0] // 8)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(REPEATS + 1):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        stream = torch.cuda.current_stream(device)
        begin.record(stream)
        target.copy_(source)
        end.record(stream)
        end.synchronize()
        best = min(best, begin.elapsed_time(end) / 1e3)
    return 2 * size / max(best, 1e-9) / 1e9
