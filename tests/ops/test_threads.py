"""The compiled ops use the threads that torch has."""

from pathlib import Path

import pytest
import torch

import tutelx

EXTENSION = Path(tutelx.__file__).parent / "_C.so"


@pytest.mark.skipif(not torch.backends.openmp.is_available(), reason="this torch has no OpenMP")
def test_the_extension_runs_parallel_regions():
    """at::parallel_for is a template: compiled without OpenMP it silently runs on one thread."""
    assert any(entry in EXTENSION.read_bytes() for entry in (b"GOMP_parallel", b"__kmpc_fork_call"))
