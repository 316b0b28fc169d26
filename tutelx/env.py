"""Every environment variable that tutelx reads, once.

Build time (setup.py): TUTELX_CUDA=1 demands the CUDA kernels, 0 forbids them; TORCH_CUDA_ARCH_LIST.
"""

from __future__ import annotations

import os


def is_ci() -> bool:
    """CI=true: progress bars are drawn once, at the end."""
    return os.environ.get("CI", "").lower() in ("1", "true")
