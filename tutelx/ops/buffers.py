"""Memory that large results leave behind on the CPU, kept for the next ones.

Fresh pages cost several times what an operator itself does. By default up to a quarter of the memory stays, shared by
the ranks of this machine; the environment variable TUTELX_BUFFER_BYTES says otherwise, 0 keeps nothing.
"""

from __future__ import annotations

from tutelx.ops._checks import check_int
from tutelx.ops._library import kernels


def set_limit(nbytes: int) -> None:
    """Keeps at most `nbytes` of free memory from now on; what is more goes back to the system at once."""
    kernels.set_buffer_limit(check_int(nbytes, "nbytes", at_least=0))


def release() -> None:
    """Gives all free memory back to the system. Tensors in use stay."""
    kernels.release_buffers()


def idle_bytes() -> int:
    """Bytes kept at present."""
    return kernels.idle_buffer_bytes()
