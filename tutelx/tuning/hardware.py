"""What a machine is, as far as speed depends on it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """The fingerprint under which measurements are filed. Rates are in GB/s (1e9 bytes a second) and measured.

    device: "cpu" or "cuda". arch: "sm_90", or the CPU's instruction set ("x86_64").
    units: multiprocessors, or cores that this process may use.
    matrix_unit: of a CPU: "amx", "avx512_bf16", "avx512", "avx2", "neon", or "".
    cache_bytes: L2 of a GPU, last level of a CPU.
    intra_link, inter_link: kind of the links inside a node and between nodes ("nvlink", "pcie", "shm", "tcp", ...);
        "" where there is none or it was not looked at, with a rate of 0.
    aliases: names that people know it by; never compared.
    """

    device: str
    arch: str
    units: int
    memory_bytes: int
    memory_rate: float
    cache_bytes: int
    matrix_unit: str = ""
    intra_link: str = ""
    intra_rate: float = 0.0
    inter_link: str = ""
    inter_rate: float = 0.0
    ranks_per_node: int = 1
    aliases: dict[str, str] = field(default_factory=dict, hash=False, compare=False)
