"""The session of this process: where it stands among the ranks, its clock, and a place for a script's values."""

from __future__ import annotations

import atexit
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist

from tutelx.errors import InvalidTypeError, InvalidValueError
from tutelx.integrations.tutel.net.groups import DistributedProperties, close, create_groups_from_world

log = logging.getLogger("tutelx")

WARM_UPS, SHORTEST = 5, 1e-6

_session: DistributedProperties | None = None


def init_data_model_parallel(group_count: int = 1, backend: str = "nccl") -> DistributedProperties:
    """Starts the session: initialises torch.distributed where a launcher started this process, and makes its groups.

    The process group is taken down at the end of the program, whose exit code stays what it is.

    Args:
        group_count: as for `net.create_groups_from_world`.
        backend: "nccl" (GPUs) or "gloo" (CPU).

    Raises:
        InvalidValueError, InvalidTypeError: as `net.create_groups_from_world`.
    """
    global _session
    before = dist.is_initialized()
    _session = create_groups_from_world(group_count=group_count, include_init=backend)
    place = _session.global_rank, _session.global_size, _session.data_rank, _session.model_rank, _session.local_device
    log.info("rank %d of %d: data rank %d, model rank %d, on %s", *place)
    if dist.is_initialized() and not before:
        atexit.register(_close)
    return _session


def get_local_session() -> DistributedProperties:
    """What :func:`init_data_model_parallel` returned last.

    Raises:
        InvalidValueError: it has not been called.
    """
    if _session is None:
        raise InvalidValueError("there is no session: call system.init_data_model_parallel() first")
    return _session


def record_time(is_cuda: bool | None = None) -> float:
    """Seconds of a clock that only runs forward, once the GPU has done all that it was asked.

    is_cuda: wait for the GPU; None asks the session, without which whoever has used a GPU waits for it.
    """
    if is_cuda is None:
        is_cuda = torch.cuda.is_initialized() if _session is None else _session.is_cuda
    if is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def perform(fn: Callable[[], Any], num_runs: int = 100) -> float:
    """Prints and returns the mean seconds of a call of `fn`, after some to warm up; at least 1e-6.

    Raises:
        InvalidValueError: `num_runs` is less than 1.
        InvalidTypeError: it is no integer.
    """
    if isinstance(num_runs, bool) or not isinstance(num_runs, int):
        raise InvalidTypeError(f"num_runs={num_runs!r} is {type(num_runs).__name__}, expected int")
    if num_runs < 1:
        raise InvalidValueError(f"num_runs={num_runs}, expected at least 1")
    for _ in range(WARM_UPS):
        fn()
    begin = record_time()
    for _ in range(num_runs):
        fn()
    seconds = (record_time() - begin) / num_runs
    print(f"Function Latency = {seconds:.8f} sec\n")
    return max(seconds, SHORTEST)


class LocalCache:
    """A script's own values by name, one set for the process."""

    _values: dict[Any, Any] = {}  # noqa: RUF012  shared on purpose

    @staticmethod
    def reset() -> None:
        """Forgets all values."""
        LocalCache._values.clear()

    @staticmethod
    def set(key: Any, val: Any) -> None:
        """Keeps a value."""
        LocalCache._values[key] = val

    @staticmethod
    def get(key: Any = None) -> Any:
        """The value of `key`, or without one all values, in the order in which their keys came.

        Raises:
            InvalidValueError: there is no such key.
        """
        if key in LocalCache._values:
            return LocalCache._values[key]
        if key is not None:
            raise InvalidValueError(f"the cache has no {key!r}, only {list(LocalCache._values)}")
        return list(LocalCache._values.values())


def cache() -> type[LocalCache]:
    """The class :class:`LocalCache`, whose methods are all static."""
    return LocalCache


def _close() -> None:
    with suppress(Exception):  # whatever the program ended with is what counts
        close()
