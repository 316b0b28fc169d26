"""What `tutelx doctor` looks at, from Python to CUDA. Each finding says what to do."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.table import Table

from tutelx import __version__
from tutelx.cli import FAILURE

State = Literal["ok", "note", "wrong"]
LEAST_PYTHON, LEAST_TORCH = (3, 10), (2, 10)
LEAST_TRANSFORMERS = (5, 7)
_COLOURS = {"ok": "green", "note": "yellow", "wrong": "bold red"}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """state: "wrong" is what tutelx cannot work with, "note" what it does without."""

    what: str
    state: State
    found: str
    advice: str = ""


def run(console: Console) -> int:
    """Prints all findings. Exit code 1 if one is wrong."""
    table = Table(title=f"tutelx {__version__}", title_justify="left", show_edge=False)
    for column in ("", "", "found", "what to do"):
        table.add_column(column)
    failed = False
    for finding in findings():
        failed = failed or finding.state == "wrong"
        mark = f"[{_COLOURS[finding.state]}]{finding.state}[/]"
        table.add_row(finding.what, mark, finding.found, finding.advice)
    console.print(table)
    return FAILURE if failed else 0


def findings() -> Iterator[Finding]:
    """In the order in which one needs the other. Never raises."""
    for look in (_python, _torch, _extension, _threads, _compiler, _cuda, _transformers):
        try:
            yield look()
        except Exception as error:
            yield Finding(what=look.__name__.strip("_"), state="wrong", found=f"{type(error).__name__}: {error}")


def _python() -> Finding:
    found = platform.python_version()
    if sys.version_info < LEAST_PYTHON:
        return Finding(what="Python", state="wrong", found=found, advice=f"needs {_dotted(LEAST_PYTHON)} or newer")
    return Finding(what="Python", state="ok", found=found)


def _torch() -> Finding:
    found = _version_of("torch")
    if found is None:
        return Finding(what="torch", state="wrong", found="not installed", advice="pip install torch")
    if _numbers(found) < LEAST_TORCH:
        return Finding(what="torch", state="wrong", found=found, advice=f"needs {_dotted(LEAST_TORCH)} or newer")
    return Finding(what="torch", state="ok", found=found)


def _extension() -> Finding:
    from tutelx.errors import ExtensionError

    try:
        from tutelx.ops import _library
    except ExtensionError as error:
        return Finding(what="extension", state="wrong", found=str(error), advice="make, or pip install again")
    import torch

    from tutelx import ops

    given = torch.tensor([[1.0, 3.0], [2.0, 2.0]])
    if ops.gate(given, 1).expert_ids.tolist() != [[1], [0]]:  # the larger; of equal ones the first
        return Finding(what="extension", state="wrong", found="gives a wrong answer", advice="build it again")
    cuda = "with CUDA kernels" if _has_cuda_kernels() else "without CUDA kernels"
    return Finding(what="extension", state="ok", found=f"{_library.kernels.name} ops, {cuda}")


def _has_cuda_kernels() -> bool:
    import torch

    return torch._C._dispatch_has_kernel_for_dispatch_key("tutelx::route", "CUDA")


def _threads() -> Finding:
    import torch

    from tutelx.env import omp_wait_policy

    threads, policy = torch.get_num_threads(), omp_wait_policy() or "not set"
    found = f"{threads} of {os.cpu_count()} cores, OMP_WAIT_POLICY {policy}"
    if not torch.backends.openmp.is_available():
        return Finding(what="threads", state="note", found=found, advice="this torch has no OpenMP: one thread an op")
    return Finding(what="threads", state="ok", found=found)


def _compiler() -> Finding:
    """Needed to build, not to run."""
    for name in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")):
        if path := shutil.which(name):
            return Finding(what="C++ compiler", state="ok", found=f"{path}: {_first_line(path, '--version')}")
    return Finding(what="C++ compiler", state="note", found="none", advice="needed only to build tutelx")


def _cuda() -> Finding:
    import torch

    nvcc = shutil.which("nvcc")
    compiler = "no nvcc" if nvcc is None else f"nvcc {_last_word(nvcc)}"
    if torch.version.cuda is None:
        return Finding(what="CUDA", state="note", found=f"this torch has none, {compiler}", advice="the CPU is used")
    found = f"torch for CUDA {torch.version.cuda}, {compiler}"
    if not torch.cuda.is_available():
        return Finding(what="CUDA", state="note", found=f"{found}, no device", advice="the CPU is used")
    names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    if not _has_cuda_kernels():
        advice = "build again with TUTELX_CUDA=1" + ("" if nvcc else ", which needs nvcc")
        return Finding(what="CUDA", state="wrong", found=f"{found}, {names}", advice=advice)
    return Finding(what="CUDA", state="ok", found=f"{found}, {names}")


def _transformers() -> Finding:
    found = _version_of("transformers")
    if found is None:
        return Finding(what="transformers", state="note", found="not installed", advice="needed only for its models")
    if _numbers(found) < LEAST_TRANSFORMERS:
        advice = f"its models are wrapped from {_dotted(LEAST_TRANSFORMERS)} on"
        return Finding(what="transformers", state="note", found=found, advice=advice)
    return Finding(what="transformers", state="ok", found=found)


def _version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _first_line(*command: str, pick: Callable[[list[str]], str] = lambda lines: lines[0]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return pick(done.stdout.strip().splitlines() or [f"exit code {done.returncode}"])


def _last_word(nvcc: str) -> str:
    """The version, which is the last word of the line that names the release."""

    def release(lines: list[str]) -> str:
        return next((line.split()[-1] for line in lines if "release" in line), lines[-1])

    return _first_line(nvcc, "--version", pick=release)
