"""A machine that is made up, so that tests measure nothing of the real one."""

from __future__ import annotations

import torch

from tutelx.tuner.machine import Machine
from tutelx.tuning.hardware import Hardware
from tutelx.tuning.here import software

HARDWARE = Hardware(
    device="cpu", arch="x86_64", units=2, memory_bytes=2**33, memory_rate=10.0, cache_bytes=2**25, matrix_unit="avx2"
)


def machine(cls=Machine, **more) -> Machine:
    cpu = torch.device("cpu")
    return cls(hardware=HARDWARE, software=software(cpu), device=cpu, **more)
