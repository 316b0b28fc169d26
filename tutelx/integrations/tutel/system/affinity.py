"""Which CPUs a rank runs on: those of one NUMA node, neighbouring ranks side by side."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from tutelx import env

log = logging.getLogger("tutelx")

NODES = Path("/sys/devices/system/node")


def init_affinity_at_program_beginning() -> None:
    """Binds this process to the NUMA node of its LOCAL_RANK, `NUMA_TYPE` ranks to a node; NUMA_TYPE=0 leaves it alone.

    Nothing is done where the launcher has bound the process already. A machine that does not tell its nodes, or forbids
    this, is a warning on the first rank.

    Raises:
        InvalidValueError: NUMA_TYPE or TUTEL_CUDA_SANDBOX is no number.
    """
    if env.cuda_sandbox() == 0 and env.numa_type() > 0:
        bind(env.local_rank() // env.numa_type())


def bind(place: int) -> None:
    """Binds this process and its successors to a node, the nodes taken in turns. CPUs that it may not use stay out."""
    try:
        nodes = nodes_of(NODES, os.sched_getaffinity(0))
        node, cpus = nodes[place % len(nodes)]
        os.sched_setaffinity(0, cpus)
    except (OSError, AttributeError, ZeroDivisionError) as error:  # no such files, no Linux, no node
        if env.local_rank() == 0:
            log.warning("the NUMA node could not be set: %s", error)
        return
    log.info("local rank %d runs on NUMA node %d of %d", env.local_rank(), node, len(nodes))


def nodes_of(folder: Path, allowed: set[int]) -> list[tuple[int, set[int]]]:
    """The NUMA nodes that the kernel shows in `folder` and their CPUs among `allowed`, without those that have none."""
    numbers = sorted(int(path.name[4:]) for path in folder.iterdir() if _is_numbered(path, "node"))
    nodes = []
    for number in numbers:
        inside = (folder / f"node{number}").iterdir()
        cpus = {int(path.name[3:]) for path in inside if _is_numbered(path, "cpu")} & allowed
        if cpus:
            nodes.append((number, cpus))
    return nodes


def _is_numbered(path: Path, prefix: str) -> bool:
    return path.name.startswith(prefix) and path.name[len(prefix) :].isdecimal()
