"""What only the real compilers can tell: the kernels build for every architecture, no register spills to memory, and
the binding agrees with the headers of the installed torch. Nothing here needs a GPU."""

import importlib.util
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cuda_emulator import CACHE, KERNELS, ROOT, content_hash

ARCHITECTURES = ("80", "90", "100")
QUICK = ("90",)  # the default run compiles for one of them
OPS = sorted(path.stem for path in KERNELS.glob("*.cu"))
NVCC_FLAGS = [
    *("-std=c++17", "-O3", "-c", "-o", "/dev/null", "-Xptxas", "-v"),
    *("-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra"),
    # As torch's build does: the 16-bit types then convert only where the code says so.
    *("-D__CUDA_NO_HALF_OPERATORS__", "-D__CUDA_NO_HALF_CONVERSIONS__"),
    *("-D__CUDA_NO_BFLOAT16_CONVERSIONS__", "-D__CUDA_NO_HALF2_OPERATORS__"),
]
CXX_FLAGS = ["-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE"]

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")


def ask_nvcc(*arguments: str) -> str:
    done = subprocess.run(["nvcc", *arguments], capture_output=True, text=True)
    return done.stdout + done.stderr


def toolkit_root() -> Path:
    """From nvcc's own account: the nvcc on the PATH may be a script that lies elsewhere."""
    here = re.search(r"_HERE_=(.+)", ask_nvcc("--dryrun", "-x", "cu", "/dev/null"))
    assert here is not None, "nvcc --dryrun does not tell where nvcc lies"
    return Path(here.group(1)).parent


def compile_kernel(op: str, architectures: tuple[str, ...]) -> str:
    """The log of nvcc and ptxas; found in the cache when nothing has changed since a successful build."""
    headers = [path.read_text() for pattern in ("*.h", "*.cuh") for path in sorted(KERNELS.glob(pattern))]
    flags = [*NVCC_FLAGS, *(f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures)]
    key = content_hash([ask_nvcc("--version"), *flags, (KERNELS / f"{op}.cu").read_text(), *headers])
    log = CACHE / f"nvcc-{op}-{key}.log"
    if log.exists():
        return log.read_text()
    command = ["nvcc", *flags, str(KERNELS / f"{op}.cu")]
    done = subprocess.run(command, capture_output=True, text=True)
    output = done.stdout + done.stderr
    if done.returncode != 0:
        return f"nvcc failed on {op}.cu:\n{output}"
    CACHE.mkdir(parents=True, exist_ok=True)
    log.write_text(output)
    return output


def compile_all(architectures: tuple[str, ...]) -> dict[str, str]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(OPS, pool.map(lambda op: compile_kernel(op, architectures), OPS)))


@pytest.fixture(scope="module")
def quick_logs():
    return compile_all(QUICK)


@pytest.fixture(scope="module")
def all_logs():
    return compile_all(ARCHITECTURES)


def check_log(op: str, log: str, architectures: tuple[str, ...]) -> None:
    assert "nvcc failed" not in log, log[:4000]
    for architecture in architectures:
        assert f"'sm_{architecture}'" in log, f"no kernel of {op}.cu was compiled for sm_{architecture}"
    # ptxas reports an entry's name, then its spills.
    spills = r"entry function '(\S+)' for '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
    reports = re.findall(spills, log, re.S)
    assert reports, "ptxas reported nothing"
    spilled = [report for report in reports if report[2:] != ("0", "0")]
    assert not spilled, f"{op}.cu spills registers: {spilled}"


@needs_nvcc
@pytest.mark.parametrize("op", OPS)
def test_kernels_compile_without_warnings_and_spills(op, quick_logs):
    check_log(op, quick_logs[op], QUICK)


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_kernels_compile_for_every_architecture(op, all_logs):
    check_log(op, all_logs[op], ARCHITECTURES)


@needs_nvcc
@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_binding_compiles_against_torch():
    import torch
    from torch.utils.cpp_extension import include_paths

    csrc = ROOT / "csrc"
    sources = [csrc / "cuda" / "bindings.cpp", csrc / "check.h", csrc / "kernels" / "launch.h"]
    key = content_hash([torch.__version__, ask_nvcc("--version"), *CXX_FLAGS, *(path.read_text() for path in sources)])
    passed = CACHE / f"binding-{key}.passed"
    if passed.exists():
        return
    includes = [flag for path in (*include_paths(), toolkit_root() / "include") for flag in ("-isystem", str(path))]
    done = subprocess.run(["g++", *CXX_FLAGS, *includes, str(sources[0])], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:4000]
    CACHE.mkdir(parents=True, exist_ok=True)
    passed.touch()
