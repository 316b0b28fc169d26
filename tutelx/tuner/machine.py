"""The machine that is measured: its fingerprint, its clock, and whether it is throttled right now."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from tutelx.comm.mesh import as_mesh
from tutelx.tuning import nvml
from tutelx.tuning.hardware import Hardware
from tutelx.tuning.here import here, software
from tutelx.tuning.links import probe_links


@dataclass(frozen=True, kw_only=True)
class Machine:
    """hardware, software: what records are filed under. device: of this rank. card: what its driver tells."""

    hardware: Hardware
    software: dict[str, str]
    device: torch.device
    card: nvml.Nvml | None = field(default=None, compare=False)

    @classmethod
    def here(cls, device: torch.device, group: dist.ProcessGroup | None = None) -> Machine:
        """This machine, with the links between the ranks of `group`, all of which must call."""
        hardware = here(device)
        mesh = as_mesh(group)
        if group is not None and mesh is not None:
            hardware = probe_links(group, mesh.ranks_per_node).of(hardware)
        card = nvml.of_device(device) if device.type == "cuda" else None
        return cls(hardware=hardware, software=software(device), device=device, card=card)

    def throttling(self) -> frozenset[str] | None:
        """What slows the device down right now; None if nobody tells."""
        return None if self.card is None else self.card.throttling()

    def timed(self, call: Callable[[], Any]) -> float:
        """Seconds until the call's work is done on this rank's device."""
        begin = time.perf_counter()
        call()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - begin
