"""The kernels under AddressSanitizer: reads outside of an array as well, down to the line of the kernel.

The sanitizer must be loaded before Python is, so the checks run in a process of their own.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cuda_emulator import Mutation, build

pytestmark = pytest.mark.slow  # the first time, when everything is compiled with the sanitizer

OPS = ("route", "encode", "clear_empty", "decode", "gate", "activation")

# Read without a bound check; what is read is not used, so that only the sanitizer can tell.
READS_TOO_FAR = Mutation(
    file="encode.cu",
    old="const int32_t row = dest_K[k];",
    new="const int32_t row = dest_K[k + (dest_K[K] == 1 << 30)];",
)

RUN_CHECKS = """
import cuda_checks as checks
from cuda_emulator import Kernels
for seed in (0, 1):
    for misalign in (0, 1):
        kernels = Kernels(seed=seed, misalign=misalign)
        checks.check_route(kernels, 1, 700, 5, 37, 20, padded=True, ordered=True)
        checks.check_route(kernels, 2, 1501, 3, 37, -1, padded=False, ordered=False)
        for D in (33, 1032):
            checks.check_encode(kernels, 1, 7, 3, 4, D, "bf16", padded=True)
            checks.check_clear_empty(kernels, 1, 7, 3, 4, D, "bf16")
            for K in (1, 2, 5):
                checks.check_decode(kernels, 1, 7, K, 4, D, "bf16", "f32", padded=False)
        checks.check_gate(kernels, 1, 9, 70, 5, "softmax", True, "f32")
        checks.check_gate(kernels, 1, 9, 70, 5, "sigmoid", True, "f32", biased=True, groups=5, kept=2, best_of=2)
        checks.check_activation(kernels, 1, 5, 33, "gelu", "f16", gated=True, padding=7)
print("all checks passed")
"""

RUN_MUTANT = """
import cuda_checks as checks
from cuda_emulator import Kernels
from test_cuda_asan import READS_TOO_FAR
checks.check_encode(Kernels(mutation=READS_TOO_FAR), 1, 7, 3, 4, 40, "f32", padded=True)
"""


def asan_library() -> Path:
    done = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    path = Path(done.stdout.strip())
    if not path.is_absolute():
        pytest.skip("libasan is not installed")
    return path.resolve()


def run(code: str) -> subprocess.CompletedProcess:
    environment = {
        **os.environ,
        "LD_PRELOAD": str(asan_library()),
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": str(Path(__file__).parent),
    }
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module", autouse=True)
def built():
    """Built beforehand: the compiler itself need not run under the sanitizer."""
    asan_library()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        builds = [pool.submit(build, op, sanitize=True) for op in OPS]
        builds.append(pool.submit(build, "encode", READS_TOO_FAR, sanitize=True))
        for one in builds:
            one.result()


def test_no_kernel_leaves_its_arrays():
    done = run(RUN_CHECKS)
    assert "all checks passed" in done.stdout, done.stderr[-4000:]


def test_a_read_too_far_is_seen():
    done = run(RUN_MUTANT)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr, done.stderr[-4000:]
    assert "encode.cu" in done.stderr
