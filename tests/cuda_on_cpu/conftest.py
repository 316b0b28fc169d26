"""CUDA kernels on the CPU: the kernels' own sources, compiled by g++ against an emulation of CUDA."""

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

NEEDS_COMPILER = {"test_cuda_kernels.py", "test_cuda_emulation.py", "test_cuda_mutants.py", "test_cuda_asan.py"}


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes long; the default run leaves it out")


def pytest_collection_modifyitems(items):
    if shutil.which("g++") is not None:
        return
    for item in items:
        if item.path.name in NEEDS_COMPILER:
            item.add_marker(pytest.mark.skip(reason="g++ is not installed"))
