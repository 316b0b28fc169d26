"""Hardware sheets: the rates that the model computes with, and where each comes from.

Datasheet facts are those of NVIDIA's data sheets: A100 80GB SXM (312 and 156 TFLOP/s dense in 16 bits and TF32, 2.039
TB/s, NVLink 600 GB/s both ways), H100 SXM (989, 494, 3.35 TB/s, 900 GB/s), H200 (the same, 4.8 TB/s) and DGX B200 (one
GPU of it: 2250, 1125, 8 TB/s, 1800 GB/s). Seven constants are fitted, all on the sheet a100-hdr and to figures that
Tutel's paper prints; the other GPU sheets take the same ones, as nothing was measured on them:

- PRODUCTS: 371.8 and 375.1 ms of compute in its one-layer table.
- LINKS and CONTENTION: the exchange of that table at 16 and 256 GPUs; 64 is held out.
- STEEPNESS (links.py): two steps against linear at 2048 GPUs.
- MESSAGE, INTERFERENCE and STRIDED (links.py): so that the best linear degree, and linear against two steps, change
  where the paper says.

What else is no datasheet fact is an estimate, and says so below.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from tutelx.errors import InvalidValueError
from tutelx.tuning.hardware import Hardware

PRODUCTS = 0.455  # of the peak, large products
LINKS = 0.91  # of the rate between nodes
CONTENTION = 522  # peers on other nodes at which a link is at half its rate
MESSAGE = 6e-6  # seconds of one message between nodes
INTERFERENCE = 0.3  # of what is hidden, lost again

_NVLINK = 0.75  # of its rate; estimate: what all-to-alls inside a node commonly reach
_COPY = 0.8  # of the memory's rate; estimate: what a device-to-device copy commonly reaches
_LAUNCH = 10e-6  # seconds; estimate: a kernel's launch and its first and last wave


@dataclass(frozen=True, kw_only=True)
class Link:
    """n messages with b bytes in all take n * latency + b / rate * (1 + (n / contention) ** 1.5) seconds.

    rate: bytes a second of one rank, all ranks sending. latency: seconds of a message that the next cannot hide; it is
    also what makes small messages inefficient, half the rate at latency * rate bytes. contention: peers at which flows
    meet so often that the rate halves; None: never.
    """

    rate: float
    latency: float
    contention: float | None = None


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """One machine.

    products: FLOP/s of large products by dtype; on the CPU of one thread.
    half_rows: rows of one product at which it runs at half that rate.
    memory_rate: bytes a second, read and written; on the CPU of one thread.
    start: seconds of one operation, however small. chunk_start: of one exchange, beside its messages.
    interference: share of what overlap hides that is lost again, as both sides are slowed.
    ranks_per_node: where a workload does not say.
    """

    name: str
    device: str
    products: Mapping[str, float]
    half_rows: float
    memory_rate: float
    start: float
    chunk_start: float
    interference: float
    intra: Link
    inter: Link
    ranks_per_node: int
    source: str

    def rate(self, dtype: str) -> float:
        """FLOP/s of large products; an unknown dtype counts as float32."""
        return self.products.get(dtype, self.products["float32"])


def _gpu(name: str, *, half: float, single: float, memory: float, nvlink: float, network: float, source: str) -> Sheet:
    """half, single: peak TFLOP/s in 16 bits and TF32; memory: TB/s; nvlink, network: GB/s of a GPU, one way."""
    return Sheet(
        name=name,
        device="cuda",
        products={
            "bfloat16": half * 1e12 * PRODUCTS,
            "float16": half * 1e12 * PRODUCTS,
            "float32": single * 1e12 * PRODUCTS,
            "float64": single * 1e12 * PRODUCTS / 8,
        },
        half_rows=16,  # estimate: the rows that a matrix unit's tile has at least
        memory_rate=memory * 1e12 * _COPY,
        start=_LAUNCH,
        chunk_start=10 * _LAUNCH,
        interference=INTERFERENCE,
        intra=Link(rate=nvlink * 1e9 * _NVLINK, latency=2e-6),  # estimate of the latency
        inter=Link(rate=network * 1e9 * LINKS, latency=MESSAGE, contention=CONTENTION),
        ranks_per_node=8,
        source=source,
    )


SHEETS: Mapping[str, Sheet] = {
    found.name: found
    for found in (
        _gpu(
            "a100-hdr",
            half=312,
            single=156,
            memory=2.039,
            nvlink=300,
            network=25,
            source="A100 80GB SXM data sheet; 8 a node, 8 x 200 Gb/s between (the testbed of Tutel's paper)",
        ),
        _gpu(
            "h100",
            half=989,
            single=494,
            memory=3.35,
            nvlink=450,
            network=50,
            source="H100 SXM data sheet; DGX H100: 8 a node, 8 x 400 Gb/s between; shares fitted on a100-hdr",
        ),
        _gpu(
            "h200",
            half=989,
            single=494,
            memory=4.8,
            nvlink=450,
            network=50,
            source="H200 SXM data sheet; DGX H200: 8 a node, 8 x 400 Gb/s between; shares fitted on a100-hdr",
        ),
        _gpu(
            "b200",
            half=2250,
            single=1125,
            memory=8.0,
            nvlink=900,
            network=50,
            source="DGX B200 data sheet: 8 a node, 8 x 400 Gb/s between; shares fitted on a100-hdr",
        ),
        Sheet(
            name="cpu-gloo",
            device="cpu",
            products={"float32": 100e9, "float64": 50e9, "bfloat16": 300e9, "float16": 100e9},
            half_rows=16,
            memory_rate=8e9,
            start=10e-6,
            chunk_start=100e-6,
            interference=0.5,
            intra=Link(rate=1e9, latency=50e-6),
            inter=Link(rate=0.125e9, latency=100e-6),
            ranks_per_node=8,
            source="round figures of a server's core, loopback and gigabit Ethernet; to be calibrated",
        ),
    )
}


def sheet(name: str) -> Sheet:
    """Raises InvalidValueError naming those that there are."""
    if name not in SHEETS:
        raise InvalidValueError(f"hardware={name!r} is none of {', '.join(SHEETS)}")
    return SHEETS[name]


def sheet_of(hardware: Hardware) -> Sheet:
    """A sheet with the rates that were measured; products, overheads and rates of 0 are those of the nearest sheet.

    The nearest: on the CPU cpu-gloo, else the same arch, of these the one whose memory rate is closest, else the
    closest of all. A GPU's products go with its memory rate where the arch is another.
    """
    if hardware.device == "cpu":
        base = SHEETS["cpu-gloo"]
    else:
        arches = {"a100-hdr": "sm_80", "h100": "sm_90", "h200": "sm_90", "b200": "sm_100"}
        named = [SHEETS[name] for name, arch in arches.items() if arch == hardware.arch]
        choose = named or [SHEETS[name] for name in arches]
        base = min(choose, key=lambda s: abs(s.memory_rate - hardware.memory_rate * 1e9))
    # A CPU's memory rate is that of all cores, which share it.
    memory = hardware.memory_rate * 1e9 / (hardware.units if hardware.device == "cpu" else 1)
    intra, inter = hardware.intra_rate * 1e9, hardware.inter_rate * 1e9
    return replace(
        base,
        name=f"{hardware.device}-{hardware.arch}",
        memory_rate=memory if memory > 0 else base.memory_rate,
        intra=replace(base.intra, rate=intra) if intra > 0 else base.intra,
        inter=replace(base.inter, rate=inter) if inter > 0 else base.inter,
        ranks_per_node=hardware.ranks_per_node,
        source=f"measured rates of memory and links; the rest: {base.name}",
    )
