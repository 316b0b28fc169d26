"""Hardware, keys, records and workloads by hand."""

from dataclasses import replace
from pathlib import Path

from tutelx.tuning.hardware import Hardware
from tutelx.tuning.key import Key
from tutelx.tuning.parse import to_line
from tutelx.tuning.records import Candidate, Record, StoredPlan
from tutelx.types import Workload

HERE = Hardware(
    device="cpu",
    arch="x86_64",
    units=2,
    memory_bytes=2**33,
    memory_rate=10.0,
    cache_bytes=2**25,
    matrix_unit="avx512",
    aliases={"cpu": "some CPU"},
)
DEFAULT = StoredPlan(layout="ragged", expert_kernel="tiled")
PADDED = StoredPlan(layout="padded", expert_kernel="tiled")
BMM = StoredPlan(layout="padded", expert_kernel="bmm")
GROUPED = StoredPlan(layout="ragged", expert_kernel="grouped")
SOFTWARE = {"tutelx": "0.1.0", "torch": "2.13.0+cpu"}


def key(**change) -> Key:
    fields = {
        "tokens": 1024,
        "top_k": 2,
        "load_factor": 1.0,
        "num_experts": 8,
        "model_dim": 64,
        "hidden_dim": 128,
        "expert_numbers": 2 * 64 * 128,
        "dtype": "float32",
        "device": "cpu",
        "training": True,
        "threads": 2,
    }
    return Key(**{**fields, **change})


def workload(of: Key | None = None, **change) -> Workload:
    """One that falls into the key, with as much load as it says."""
    of = of or key()
    fields = {
        "tokens": of.tokens,
        "top_k": of.top_k,
        "num_experts": of.num_experts,
        "model_dim": of.model_dim,
        "hidden_dim": of.hidden_dim,
        "demand": round(of.load_factor * of.tokens * of.top_k / of.num_experts),
        "capacity": None,
        "dtype": of.dtype,
        "device": of.device,
        "training": of.training,
        "threads": of.threads,
        "world": of.world,
        "ranks_per_node": of.ranks_per_node,
        "expert_numbers": of.expert_numbers,
        "expert_kernels": ("tiled", "bmm", "grouped"),
    }
    return Workload(**{**fields, **change})


def candidate(plan: StoredPlan, ratio: float, seconds: float = 1.0, **change) -> Candidate:
    """seconds: of the default."""
    fields = {"median": seconds * ratio, "iqr": 0.0, "n": 9, "ratio": ratio, "error": 1e-7}
    return Candidate(plan=plan, **{**fields, **change})


def record(*candidates: Candidate, at: Key | None = None, seconds: float = 1.0, **change) -> Record:
    """The default takes `seconds`."""
    fields = {
        "hardware": HERE,
        "default": DEFAULT,
        "software": dict(SOFTWARE),
        "provenance": {"date": "2026-01-01T00:00:00Z", "command": "by hand"},
        **change,
    }
    every = (candidate(fields["default"], 1.0, seconds), *candidates)
    return Record(key=at or key(), candidates=every, **fields)


def write(root: Path, *records: Record) -> Path:
    """The file of the last one."""
    for each in records:
        path = root / each.hardware.folder / f"{each.op}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write(to_line(each))
    return path


def on(hardware: Hardware, **change) -> Hardware:
    return replace(hardware, **change)
