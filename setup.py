"""Builds the extensions: the CPU ops and the exchange between ranks always, the CUDA kernels where torch has CUDA and
nvcc is there.

TUTELX_CUDA=1 demands the CUDA build, TUTELX_CUDA=0 forbids it. TORCH_CUDA_ARCH_LIST chooses the architectures.
TUTELX_PYTHON_API=0 leaves out what wants Python's headers: the quick way to the operators, and layers over many ranks.
"""

import os
import shutil
import subprocess
from pathlib import Path

import torch
from setuptools import setup
from setuptools.command.build_py import build_py


def toolkit_root() -> str | None:
    """Where nvcc says it lives. torch takes the folder above the nvcc on the PATH, which may be a mere wrapper."""
    if os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or not shutil.which("nvcc"):
        return None
    dry_run = subprocess.run(["nvcc", "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False)
    for line in dry_run.stderr.splitlines():
        if "_HERE_=" in line:
            return str(Path(line.split("_HERE_=")[1].strip()).parent)
    return None


if root := toolkit_root():
    os.environ["CUDA_HOME"] = root  # read when torch.utils.cpp_extension is imported

from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension  # noqa: E402

ROOT = Path(__file__).parent
DEFAULT_ARCHITECTURES = "8.0;9.0;10.0+PTX"


def sources(*patterns: str) -> list[str]:
    """Paths relative to the root, as setuptools wants them, in a fixed order."""
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def wants_cuda() -> bool:
    possible = torch.version.cuda is not None and CUDA_HOME is not None
    wish = os.environ.get("TUTELX_CUDA", "auto")
    if wish not in ("0", "1", "auto"):
        raise SystemExit(f"TUTELX_CUDA={wish!r} is none of '0', '1', 'auto'")
    if wish == "1" and not possible:
        raise SystemExit(
            f"TUTELX_CUDA=1, but torch.version.cuda={torch.version.cuda} and CUDA_HOME={CUDA_HOME}: both are needed"
        )
    return possible and wish != "0"


CXX = ["-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-Wall"]
HOLDING_CLASSES = [*CXX, "-fvisibility=hidden"]  # for Python, as pybind11 wants it
# Without it at::parallel_for runs on one thread. Not for the linker: a second OpenMP library beside the one that torch
# brings would have its own threads.
CXX += ["-fopenmp"] if torch.backends.openmp.is_available() else ["-Wno-unknown-pragmas"]


def operators():
    files = ["csrc/ops.cpp", *sources("csrc/autograd/*.cpp", "csrc/cpu/*.cpp")]
    if not wants_cuda():
        return CppExtension("tutelx._C", files, extra_compile_args={"cxx": CXX}, py_limited_api=True)
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHITECTURES)
    return CUDAExtension(
        "tutelx._C",
        files + sources("csrc/cuda/*.cpp", "csrc/kernels/*.cu"),
        include_dirs=[str(ROOT / "csrc" / "kernels")],
        extra_compile_args={"cxx": CXX, "nvcc": ["-O3"]},
        py_limited_api=True,
    )


def calls():
    """The operators as functions of Python, which ties it to the Python it was built with; so is the next."""
    return CppExtension("tutelx._calls", ["csrc/calls.cpp"], extra_compile_args={"cxx": HOLDING_CLASSES})


def many_ranks():
    files = ["csrc/comm.cpp", *sources("csrc/comm/*.cpp")]
    return CppExtension("tutelx._comm", files, extra_compile_args={"cxx": HOLDING_CLASSES})


class WithMeasurements(build_py):
    """Takes the shipped tuning database along; one run from its sources finds it beside the package."""

    def run(self):
        super().run()
        if not self.editable_mode:
            for path in sorted((ROOT / "tuning_db").glob("*/*.jsonl")):
                target = Path(self.build_lib) / "tutelx" / path.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)


setup(
    ext_modules=[operators(), *([] if os.environ.get("TUTELX_PYTHON_API") == "0" else [calls(), many_ranks()])],
    cmdclass={"build_ext": BuildExtension.with_options(no_python_abi_suffix=True), "build_py": WithMeasurements},
)
