"""These tests need a CUDA device and an extension with CUDA kernels; elsewhere they are skipped and say why."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tutelx import ops  # noqa: F401  (loads the operators)

HERE = Path(__file__).parent


def why_not() -> str | None:
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if not torch._C._dispatch_has_kernel_for_dispatch_key("tutelx::encode", "CUDA"):
        return "the extension was built without CUDA kernels (TUTELX_CUDA=1 demands them)"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = why_not()
    for item in items:
        if reason and HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever makes the host wait for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
