"""What a machine is, as far as speed depends on it."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, field

from tutelx.errors import InvalidValueError
from tutelx.tuning import strict

RATE_TOLERANCE = 1.5  # memory rates of one kind of card differ by a factor of up to this, ...
SHARED_TOLERANCE = 3.0  # ... those of a CPU, which others use too, by this, ...
LINK_TOLERANCE = 2.5  # ... and those of links by this
MEMORY_TOLERANCE = 1.1  # what a driver keeps for itself differs
_UNKNOWN = 1.0  # octaves that a quantity counts which only one side knows, or a name that differs

_NAME = r"[A-Za-z0-9_.+-]{0,40}"
_FIELDS: dict[str, strict.Check] = {
    "device": strict.choice("cpu", "cuda"),
    "arch": strict.text(r"[A-Za-z0-9_.+-]{1,40}"),
    "units": strict.integer(1, 2**20),
    "memory_bytes": strict.integer(0),
    "memory_rate": strict.number(0.0, 1e9),
    "cache_bytes": strict.integer(0),
}
_OPTIONAL: dict[str, strict.Check] = {
    "matrix_unit": strict.text(_NAME),
    "intra_link": strict.text(_NAME),
    "intra_rate": strict.number(0.0, 1e9),
    "inter_link": strict.text(_NAME),
    "inter_rate": strict.number(0.0, 1e9),
    "ranks_per_node": strict.integer(1, 2**20),
    "aliases": strict.texts,
}


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

    @property
    def folder(self) -> str:
        """The name of its folder in a database: what is counted and not measured, so that it stays the same."""
        parts = [self.device, self.arch, self.matrix_unit, f"{self.units}{'c' if self.device == 'cpu' else 'sm'}"]
        if self.device != "cpu":
            parts.append(f"{round(self.memory_bytes / 2**30)}g")
        parts.append(f"{round(self.cache_bytes / 2**20)}m")
        if self.intra_link or self.inter_link:
            parts += [f"{self.ranks_per_node}x", self.intra_link, self.inter_link]
        return "-".join(re.sub(r"[^a-z0-9_]+", "_", part.lower()) for part in parts if part)

    def same_as(self, other: Hardware, *, links: bool = True) -> bool:
        """Whether measurements of one hold for the other.

        What is counted is equal, memory rates within RATE_TOLERANCE, those of CPUs within SHARED_TOLERANCE, and a
        GPU's memory within MEMORY_TOLERANCE. The memory of a CPU decides what fits and not how fast it runs.

        links: compare the links too, their rates within LINK_TOLERANCE; what runs on one rank uses none.
        """
        counted = ("device", "arch", "units", "cache_bytes", "matrix_unit")
        linked = ("intra_link", "inter_link", "ranks_per_node") if links else ()
        if any(getattr(self, name) != getattr(other, name) for name in counted + linked):
            return False
        tolerances = {"memory_rate": SHARED_TOLERANCE}
        if self.device != "cpu":
            tolerances = {"memory_rate": RATE_TOLERANCE, "memory_bytes": MEMORY_TOLERANCE}
        if links:
            tolerances |= {"intra_rate": LINK_TOLERANCE, "inter_rate": LINK_TOLERANCE}
        return all(
            abs(_octaves(getattr(self, name), getattr(other, name))) <= math.log2(tolerance) + 1e-9
            for name, tolerance in tolerances.items()
        )

    def distance(self, other: Hardware, *, links: bool = True) -> float:
        """Octaves between two machines of one device kind and architecture family; infinite between families.

        |log2| of the ratios of units, cache, memory rate and link rates, summed; other matrix units, other
        kinds of links and what is known of one side only count as an octave each.
        """
        if self.device != other.device or family(self) != family(other):
            return math.inf
        names = ["units", "cache_bytes", "memory_rate"]
        total = _UNKNOWN * ((self.arch != other.arch) + (self.matrix_unit != other.matrix_unit))
        if links:
            names += ["intra_rate", "inter_rate"]
            total += _UNKNOWN * sum(
                getattr(self, name) != getattr(other, name) for name in ("intra_link", "inter_link", "ranks_per_node")
            )
        return total + sum(abs(_octaves(getattr(self, n), getattr(other, n))) for n in names)

    def to_json(self) -> dict[str, object]:
        """As a record holds it; what is not known is left out."""
        found = {**asdict(self), "aliases": dict(sorted(self.aliases.items()))}
        unset = {"matrix_unit": "", "intra_link": "", "intra_rate": 0.0, "inter_link": "", "inter_rate": 0.0}
        unset |= {"ranks_per_node": 1, "aliases": {}}
        return {name: value for name, value in found.items() if name not in unset or value != unset[name]}

    @classmethod
    def from_json(cls, value: object) -> Hardware:
        """Raises InvalidValueError, naming the field, if it is no hardware."""
        found = cls(**strict.record(value, "hardware", _FIELDS, _OPTIONAL))
        for link, rate in ((found.intra_link, found.intra_rate), (found.inter_link, found.inter_rate)):
            if rate and not link:
                raise InvalidValueError(f"hardware has a link rate of {rate} and no kind of link")
        return found


def family(hardware: Hardware) -> str:
    """Architectures of one family are compared: "sm_90a" and "sm_90" are "sm_9", a CPU's instruction set is its own."""
    match = re.fullmatch(r"sm_(\d+)\d[a-z]?", hardware.arch)
    return f"sm_{match[1]}" if match else hardware.arch


def _octaves(a: float, b: float) -> float:
    if a == b:
        return 0.0
    return math.log2(a / b) if a > 0 and b > 0 else (_UNKNOWN if a > b else -_UNKNOWN)
