"""Tutel's run-time compiler of CUDA source, which is not part of this runtime."""

from __future__ import annotations

from typing import NoReturn


def create_cuda_kernel(source: str, keyword_dict: dict | None = None) -> NoReturn:
    """Raises NotImplementedError: torch has compilers of its own."""
    raise NotImplementedError(
        "create_cuda_kernel compiles with Tutel's closed run-time: use torch.utils.cpp_extension.load_inline or Triton"
    )
