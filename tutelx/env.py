"""Every environment variable that tutelx reads, once.

Build time (setup.py): TUTELX_CUDA=1 demands the CUDA kernels, 0 forbids them; TORCH_CUDA_ARCH_LIST; TUTELX_PYTHON_API=0
leaves out what wants Python's headers.
"""

from __future__ import annotations

import os

from tutelx.errors import InvalidValueError


def is_ci() -> bool:
    """CI=true: progress bars are drawn once, at the end."""
    return os.environ.get("CI", "").lower() in ("1", "true")


def omp_wait_policy() -> str | None:
    """OMP_WAIT_POLICY: what an OpenMP thread does while it waits, spin (ACTIVE) or sleep (PASSIVE)."""
    return os.environ.get("OMP_WAIT_POLICY")


def default_omp_wait_policy(value: str) -> None:
    """Sets OMP_WAIT_POLICY unless the user did; it is read once, when torch is loaded."""
    os.environ.setdefault("OMP_WAIT_POLICY", value)


def local_world_size() -> int | None:
    """LOCAL_WORLD_SIZE: the ranks on this node, as torchrun sets it; None if unset.

    Raises:
        InvalidValueError: it is no positive integer.
    """
    value = os.environ.get("LOCAL_WORLD_SIZE")
    if value is None:
        return None
    if not value.isdecimal() or int(value) < 1:
        raise InvalidValueError(f"LOCAL_WORLD_SIZE={value!r} is no positive integer")
    return int(value)


def buffer_bytes() -> int | None:
    """TUTELX_BUFFER_BYTES: the most free memory that CPU operators keep for their next results; None if unset.

    Raises:
        InvalidValueError: it is no whole number of bytes.
    """
    text = os.environ.get("TUTELX_BUFFER_BYTES")
    if text is None:
        return None
    if not (text.isascii() and text.isdigit()):
        raise InvalidValueError(f"TUTELX_BUFFER_BYTES={text!r} is not a whole number of bytes")
    return int(text)


def missing_rendezvous() -> list[str]:
    """Of RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, which torchrun sets, those that are not set."""
    return [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]


def local_rank() -> int:
    """LOCAL_RANK: the rank's place on its node, 0 if unset."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def planner() -> str:
    """TUTELX_PLANNER: what plans where a layer is given no planner: "lookup" (the default), "online" or "rules".

    Raises:
        InvalidValueError: it is something else.
    """
    value = os.environ.get("TUTELX_PLANNER", "lookup")
    if value not in ("lookup", "online", "rules"):
        raise InvalidValueError(f"TUTELX_PLANNER={value!r} is none of 'lookup', 'online', 'rules'")
    return value


def default_capacity_factor() -> float:
    """CAP_FACTOR: the capacity factor of a gate in a Tutel script that gives none; 1.0 if unset.

    Raises:
        InvalidValueError: it is no number.
    """
    text = os.environ.get("CAP_FACTOR", "1.0")
    try:
        return float(text)
    except ValueError:
        raise InvalidValueError(f"CAP_FACTOR={text!r} is no number") from None


def is_batch_prioritized() -> bool:
    """BATCH_PRIO=1: layers of a Tutel script route by priority, whatever the script says."""
    return _is_on("BATCH_PRIO")


def skips_moe() -> bool:
    """SKIP_MOE=1: layers of a Tutel script give back their input, to time what is around them."""
    return _is_on("SKIP_MOE")


def _is_on(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")
