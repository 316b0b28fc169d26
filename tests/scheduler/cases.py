"""Workloads and records by hand, and a lookup that answers with them."""

from dataclasses import dataclass, replace

from tutelx.tuning.hardware import Hardware
from tutelx.tuning.key import Key
from tutelx.tuning.lookup import Lookup
from tutelx.tuning.records import Candidate, Record, StoredPlan
from tutelx.tuning.store import Database
from tutelx.types import Decision, Plan, Workload

HARDWARE = Hardware(device="cpu", arch="x86_64", units=2, memory_bytes=2**33, memory_rate=10.0, cache_bytes=2**25)
DEFAULT = StoredPlan(layout="ragged", expert_kernel="tiled")
BMM = StoredPlan(layout="padded", expert_kernel="bmm")
SMALL = StoredPlan(layout="ragged", expert_kernel="tiled", tile_rows=64, tile_columns=256)


def workload(**change) -> Workload:
    fields = {
        "tokens": 4096,
        "top_k": 2,
        "num_experts": 64,
        "model_dim": 128,
        "hidden_dim": 256,
        "demand": 150,
        "capacity": None,
        "dtype": "float32",
        "device": "cpu",
        "training": True,
        "threads": 2,
        "expert_kernels": ("tiled", "bmm"),
        "expert_numbers": 3 * 128 * 256,
    }
    return Workload(**{**fields, **change})


def candidate(plan: StoredPlan, ratio: float, **change) -> Candidate:
    fields = {"median": 0.01 * ratio, "iqr": 0.0, "n": 9, "ratio": ratio, "error": 1e-7}
    return Candidate(plan=plan, **{**fields, **change})


def record(*candidates: Candidate, key: Key | None = None, default: StoredPlan = DEFAULT) -> Record:
    return Record(
        hardware=HARDWARE,
        key=key or Key.of(workload()),
        default=default,
        candidates=(candidate(default, 1.0), *candidates),
        software={"tutelx": "0"},
        provenance={"command": "by hand"},
    )


def known(*records: Record) -> Lookup:
    return Lookup(Database(records=records), HARDWARE)


@dataclass
class Found:
    plan: Plan
    tier: str = "exact"
    reason: str = "as measured"
    predicted: float | None = None
    measured: float | None = None


class Shelf:
    """Answers every key alike, None with the rules. asked: how often."""

    def __init__(self, found: Found | None) -> None:
        self.found, self.asked = found, 0

    def find(self, key: Key, workload: Workload, rule: Decision) -> Found:
        self.asked += 1
        return Found(rule.plan, "default") if self.found is None else self.found


def plan(stored: StoredPlan, **change) -> Plan:
    return replace(stored.plan(Plan()), **change)
