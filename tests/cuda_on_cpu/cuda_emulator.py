"""Builds the kernels for the CPU and calls them with numpy arrays.

Outputs start out as garbage, so what a kernel fails to write shows. Arrays lie between guard bytes that are checked
after every call; under AddressSanitizer they are exactly sized allocations instead.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
KERNELS = ROOT / "csrc" / "kernels"
CACHE = ROOT / "build" / "cuda_on_cpu"

FLAGS = [
    *("-std=c++20", "-O1", "-fopenmp", "-shared", "-fPIC", "-DTUTELX_CUDA_EMULATION"),
    # Two builds of one kernel in a process must not share their static variables.
    "-fno-gnu-unique",
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-subobject-linkage", "-Wno-maybe-uninitialized"),
]
SANITIZE = ["-g", "-fsanitize=address"]
MUTANT = ["-O0", "-w"]  # compiled once and run once; a change may leave a variable unused

DTYPES = {"f32": 0, "f64": 1, "bf16": 2, "f16": 3}
STORAGE = {"f32": np.float32, "f64": np.float64, "bf16": np.uint16, "f16": np.float16}
SCORES = {"softmax": 0, "sigmoid": 1}
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}

# Waiting threads of the emulation must not spin: they would take the time from whatever else runs.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

UNDER_ASAN = "libasan" in os.environ.get("LD_PRELOAD", "")
GUARD_BYTES = 64
GARBAGE, GUARD = 0x7B, 0xA5
SUCCESS = 0


class EmulationError(Exception):
    """The emulation stopped a kernel: a race, a divergent barrier, a failed device assertion, ..."""


# ---- Building --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Mutation:
    """One textual change to one kernel source; `old` occurs there exactly once."""

    file: str
    old: str
    new: str

    def apply(self, text: str) -> str:
        found = text.count(self.old)
        if found != 1:
            raise ValueError(f"{self.old!r} occurs {found} times in {self.file}, expected 1")
        return text.replace(self.old, self.new)


def sources_of(op: str, mutation: Mutation | None) -> dict[str, str]:
    """The kernel sources that `op` can include, by name, with the mutation applied."""
    paths = [*KERNELS.glob("*.h"), *KERNELS.glob("*.cuh"), *KERNELS.glob(f"{op}.cu")]
    texts = {path.name: path.read_text() for path in sorted(paths)}
    if mutation is not None:
        texts[mutation.file] = mutation.apply(texts[mutation.file])
    return texts


def content_hash(parts: list[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:20]


@functools.cache
def compiler_version() -> str:
    return subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]


def build(op: str, mutation: Mutation | None = None, sanitize: bool = False) -> Path:
    """Compiles one op's kernels into a shared library, or finds it in the cache."""
    flags = FLAGS + (SANITIZE if sanitize else []) + (MUTANT if mutation else [])
    kernels = sources_of(op, mutation)
    entry = HERE / "entry_points" / f"{op}.cpp"
    emulation = [path.read_text() for path in sorted((HERE / "emulation").iterdir())]
    key = content_hash([compiler_version(), *flags, *kernels, *kernels.values(), entry.read_text(), *emulation])
    library = CACHE / f"{op}-{key}.so"
    if library.exists():
        return library
    CACHE.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=CACHE))
    try:
        (scratch / "kernels").mkdir()
        for name, text in kernels.items():
            (scratch / "kernels" / name).write_text(text)
        output = scratch / "out.so"
        command = ["g++", *flags, "-I", str(HERE / "emulation"), "-I", str(scratch), "-o", str(output), str(entry)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"g++ failed on {op}:\n{done.stderr[:8000]}")
        output.rename(library)  # atomic: another process may be building the same
    finally:
        shutil.rmtree(scratch)
    return library


# ---- Arrays ----------------------------------------------------------------------------------------------------------


def to_storage(values, dtype: str) -> np.ndarray:
    """Rounds to `dtype`; bf16 is kept as its 16 bits."""
    if dtype != "bf16":
        return np.asarray(values).astype(STORAGE[dtype])
    bits = np.asarray(values, dtype=np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def to_float(stored: np.ndarray, dtype: str) -> np.ndarray:
    if dtype != "bf16":
        return stored.astype(np.float64)
    return (stored.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


LIBC = ctypes.CDLL(None)
LIBC.malloc.restype = ctypes.c_void_p
LIBC.malloc.argtypes = [ctypes.c_size_t]
LIBC.free.argtypes = [ctypes.c_void_p]


class DeviceArray:
    """An array whose address is a multiple of 16 plus `misalign`, with guards around it."""

    def __init__(self, shape, storage, values=None, misalign: int = 0):
        size = int(np.prod(shape)) * np.dtype(storage).itemsize
        guard = 0 if UNDER_ASAN else GUARD_BYTES
        total = guard + misalign + size + guard
        base = LIBC.malloc(max(total, 1))
        memory = (ctypes.c_uint8 * total).from_address(base)
        weakref.finalize(memory, LIBC.free, base)  # every view of the array keeps `memory` alive
        self.raw = np.frombuffer(memory, dtype=np.uint8)
        start = guard + misalign
        self.guards = [self.raw[:start], self.raw[start + size :]]
        for g in self.guards:
            g[:] = GUARD
        self.raw[start : start + size] = GARBAGE
        self.array = self.raw[start : start + size].view(storage).reshape(shape)
        self.address = base + start
        if values is not None:
            self.array[...] = values

    def check(self) -> None:
        assert all((g == GUARD).all() for g in self.guards), "a kernel wrote outside an array"


# ---- Calling ---------------------------------------------------------------------------------------------------------


class Kernels:
    """The kernels as functions of numpy arrays.

    `seed` orders the threads; 0 is ascending order. Every array begins `misalign` elements past a 16-byte boundary.
    """

    def __init__(self, *, seed: int = 0, misalign: int = 0, mutation: Mutation | None = None):
        self.seed = seed
        self.misalign = misalign
        self.mutation = mutation

    def library(self, op: str) -> ctypes.CDLL:
        mutation = self.mutation
        if mutation is not None and mutation.file not in sources_of(op, None):
            mutation = None
        loaded = load(op, mutation)
        if isinstance(loaded, RuntimeError):
            raise loaded
        return loaded

    def input(self, values: np.ndarray | None) -> DeviceArray | None:
        if values is None:
            return None
        return DeviceArray(values.shape, values.dtype, values, self.misalign * values.dtype.itemsize)

    def output(self, shape, storage) -> DeviceArray:
        return DeviceArray(shape, storage, misalign=self.misalign * np.dtype(storage).itemsize)

    def scratch(self, op: str, *sizes: int) -> DeviceArray:
        function = self.library(op)[f"{op}_scratch"]
        function.restype = ctypes.c_long
        return DeviceArray((function(*[as_argument(s) for s in sizes]),), np.uint8)

    def call(self, op: str, function: str, *arguments) -> None:
        library = self.library(op)
        library.emulation_begin(ctypes.c_ulong(self.seed))
        arrays = [a for a in arguments if isinstance(a, DeviceArray)]
        status = library[function](*[as_argument(a) for a in arguments])
        library.emulation_message.restype = ctypes.c_char_p
        message = library.emulation_message().decode()
        if message:
            raise EmulationError(message)
        if status != SUCCESS:
            raise ValueError(f"{function} returned cudaError_t {status}")
        for array in arrays:
            array.check()

    def route(self, expert_ids, E, capacity=-1, padded=False, order=None, two_steps=False):
        T, K = expert_ids.shape
        R = E * capacity if padded else T * K
        out = [self.output(shape, np.int32) for shape in ((T, K), (R,), (E,), (E + 1,))]
        scratch = self.scratch("route", T, K, E)
        inputs = self.input(expert_ids), self.input(order)
        for step in (1, 2) if two_steps else (0,):
            self.call("route", "route", step, *inputs, T, K, E, capacity, padded, *out, scratch)
        return tuple(a.array for a in out)

    def encode(self, x, dest, source, dtype):
        (T, K), D = dest.shape, x.shape[1]
        rows = self.output((source.size, D), x.dtype)
        sizes = T, K, source.size, D, DTYPES[dtype]
        self.call("encode", "encode", self.input(x), self.input(dest), self.input(source), rows, *sizes)
        return rows.array

    def encode_backward(self, drows, dest, dtype):
        (T, K), (R, D) = dest.shape, drows.shape
        dx = self.output((T, D), drows.dtype)
        self.call("encode", "encode_backward", self.input(drows), self.input(dest), dx, T, K, R, D, DTYPES[dtype])
        return dx.array

    def clear_empty(self, rows, source, dtype):
        held = self.input(rows)
        self.call("clear_empty", "clear_empty", held, self.input(source), *rows.shape, DTYPES[dtype])
        return held.array

    def decode(self, rows, dest, weights, dtype, weights_dtype):
        (T, K), (R, D) = dest.shape, rows.shape
        y = self.output((T, D), rows.dtype)
        inputs = self.input(rows), self.input(dest), self.input(weights)
        self.call("decode", "decode", *inputs, y, T, K, R, D, DTYPES[dtype], DTYPES[weights_dtype])
        return y.array

    def decode_backward(self, dy, rows, dest, source, weights, dtype, weights_dtype):
        (T, K), (R, D) = dest.shape, rows.shape
        drows, dweights = self.output((R, D), rows.dtype), self.output((T, K), weights.dtype)
        inputs = [self.input(a) for a in (dy, rows, dest, source, weights)]
        sizes = T, K, R, D, DTYPES[dtype], DTYPES[weights_dtype]
        self.call("decode", "decode_backward", *inputs, drows, dweights, *sizes)
        return drows.array, dweights.array

    def gate(self, logits, K, score, renormalize, dtype, bias=None, groups=1, kept=1, best_of=1):
        T, E = logits.shape
        wide = np.float64 if dtype == "f64" else np.float32
        ids = self.output((T, K), np.int32)
        weights, score_sum, logsumexp = (self.output(shape, wide) for shape in ((T, K), (E,), (T,)))
        scratch = self.scratch("gate", T, E, DTYPES[dtype])
        sizes = T, E, K, SCORES[score], renormalize
        choice = self.input(bias), groups, kept, best_of
        outputs = ids, weights, score_sum, logsumexp
        self.call("gate", "gate", self.input(logits), *outputs, scratch, *sizes, *choice, DTYPES[dtype])
        return ids.array, weights.array, score_sum.array, logsumexp.array

    def gate_backward(self, dweights, dscore_sum, dlogsumexp, logits, ids, logsumexp, score, renormalize, dtype):
        (T, E), K = logits.shape, ids.shape[1]
        dlogits = self.output((T, E), logits.dtype)
        inputs = [self.input(a) for a in (dweights, dscore_sum, dlogsumexp, logits, ids, logsumexp)]
        sizes = T, E, K, SCORES[score], renormalize, DTYPES[dtype]
        self.call("gate", "gate_backward", *inputs, dlogits, *sizes)
        return dlogits.array

    def activation(self, gate, up, H, kind, dtype):
        """`gate` and `up` are [N, stride] of which the first H columns count."""
        N = gate.shape[0]
        out = self.output((N, H), gate.dtype)
        arguments = [*strided(self.input(gate)), *strided(self.input(up)), *strided(out)]
        self.call("activation", "activation", *arguments, N, H, ACTIVATIONS[kind], DTYPES[dtype])
        return out.array

    def activation_backward(self, dout, gate, up, H, kind, dtype):
        N = gate.shape[0]
        dgate = self.output((N, H), gate.dtype)
        dup = None if up is None else self.output((N, H), gate.dtype)
        arguments = [*strided(self.input(dout)), *strided(self.input(gate)), *strided(self.input(up))]
        arguments += [*strided(dgate), *strided(dup)]
        self.call("activation", "activation_backward", *arguments, N, H, ACTIVATIONS[kind], DTYPES[dtype])
        return dgate.array, None if dup is None else dup.array


@functools.cache
def load(op: str, mutation: Mutation | None) -> ctypes.CDLL | RuntimeError:
    """Also remembers a failed build, so that a kernel that does not compile fails every test but is compiled once."""
    try:
        return ctypes.CDLL(str(build(op, mutation, sanitize=UNDER_ASAN)))
    except RuntimeError as error:
        return error


def as_argument(value):
    if value is None:
        return ctypes.c_void_p(None)
    if isinstance(value, DeviceArray):
        return ctypes.c_void_p(value.address)
    return ctypes.c_int64(int(value))


def strided(array: DeviceArray | None) -> tuple[DeviceArray | None, int]:
    return (None, 0) if array is None else (array, array.array.shape[1])
