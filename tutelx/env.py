"""Every environment variable that tutelx reads, once.

Build time (setup.py): TUTELX_CUDA=1 demands the CUDA kernels, 0 forbids them; TORCH_CUDA_ARCH_LIST; TUTELX_PYTHON_API=0
leaves out what wants Python's headers.
"""

from __future__ import annotations

import os
from pathlib import Path

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
    return _integer("LOCAL_WORLD_SIZE", least=1)


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


def is_first_rank() -> bool:
    """RANK is 0 or unset."""
    return os.environ.get("RANK", "0") == "0"


def rank_environment(rank: int, world: int, port: int) -> dict[str, str]:
    """The environment of one of `world` processes on this machine, as torchrun sets it, on top of this process's own.

    As there, a rank has one thread unless OMP_NUM_THREADS says otherwise; gloo talks over the loopback device unless
    GLOO_SOCKET_IFNAME does.
    """
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    defaults = {"OMP_NUM_THREADS": "1"}
    if os.path.isdir("/sys/class/net/lo"):
        defaults["GLOO_SOCKET_IFNAME"] = "lo"
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return {**defaults, **os.environ, **where, **{name: str(value) for name, value in own.items()}}


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


# What scripts and job files for Tutel set.


def local_size() -> int | None:
    """LOCAL_SIZE: the ranks on each host, for `mpiexec -x LOCAL_SIZE=8`; None if unset.

    Raises:
        InvalidValueError: it is no positive integer. So do the functions below for theirs.
    """
    return _integer("LOCAL_SIZE", least=1)


def mpi_place() -> tuple[int, int, int] | None:
    """OMPI_COMM_WORLD_RANK, _SIZE and _LOCAL_RANK, as Open MPI sets them; None where it did not start this."""
    world = _integer("OMPI_COMM_WORLD_SIZE", least=1)
    if world is None:
        return None
    return _integer("OMPI_COMM_WORLD_RANK") or 0, world, _integer("OMPI_COMM_WORLD_LOCAL_RANK") or 0


def launched_ranks() -> int:
    """WORLD_SIZE, 1 if unset."""
    return _integer("WORLD_SIZE", least=1) or 1


def is_torchrun() -> bool:
    """LOCAL_RANK is set: torchrun started this process."""
    return "LOCAL_RANK" in os.environ


def master() -> tuple[str | None, int | None]:
    """MASTER_ADDR and MASTER_PORT: where ranks meet."""
    return os.environ.get("MASTER_ADDR"), _integer("MASTER_PORT", least=1)


def group_timeout() -> int | None:
    """TUTEL_GLOBAL_TIMEOUT_SEC: seconds after which a rank gives up waiting for another; None if unset."""
    return _integer("TUTEL_GLOBAL_TIMEOUT_SEC", least=1)


def numa_type() -> int:
    """NUMA_TYPE: how many neighbouring ranks share a NUMA node, 1 if unset; 0 or less leaves the affinity alone."""
    if os.environ.get("NUMA_TYPE", "").startswith("-"):
        return 0
    found = _integer("NUMA_TYPE")
    return 1 if found is None else found


def cuda_sandbox() -> int:
    """TUTEL_CUDA_SANDBOX: 1 once the launcher has bound this process, 2 asks it to show each rank one GPU; else 0."""
    return _integer("TUTEL_CUDA_SANDBOX") or 0


def omp_threads() -> int:
    """OMP_NUM_THREADS, 1 if unset."""
    return _integer("OMP_NUM_THREADS", least=1) or 1


def default_threads(number: int) -> None:
    """Sets OMP_NUM_THREADS for this process's children, unless the user did."""
    os.environ.setdefault("OMP_NUM_THREADS", str(number))


def enter_sandbox(local_rank: int) -> None:
    """Marks this process's successor as bound, or shows it only its GPU of those in CUDA_VISIBLE_DEVICES."""
    if cuda_sandbox() != 2:
        os.environ["TUTEL_CUDA_SANDBOX"] = "1"
        return
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = [str(local_rank)] if listed is None else [each.strip() for each in listed.split(",")]
    if listed is not None and local_rank >= len(visible):
        raise InvalidValueError(f"LOCAL_RANK={local_rank}, but CUDA_VISIBLE_DEVICES={listed!r} has {len(visible)}")
    os.environ["CUDA_VISIBLE_DEVICES"] = visible[0 if listed is None else local_rank]


def _integer(name: str, least: int = 0) -> int | None:
    value = os.environ.get(name)
    if value is None:
        return None
    if not (value.isascii() and value.isdecimal()) or int(value) < least:
        kind = "no positive integer" if least else "no whole number"
        raise InvalidValueError(f"{name}={value!r} is {kind}")
    return int(value)


def tuning_databases() -> list[str]:
    """TUTELX_TUNING_DB: the site's folders of measurements, separated as in PATH, the first counting most."""
    return [folder for folder in os.environ.get("TUTELX_TUNING_DB", "").split(os.pathsep) if folder]


def cache_folder() -> Path | None:
    """Of tutelx, for this user, in XDG_CACHE_HOME or else ~/.cache; it need not exist. None where there is no home."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    try:
        # The standard has relative paths ignored.
        return (Path(cache) if os.path.isabs(cache) else Path.home() / ".cache") / "tutelx"
    except RuntimeError:
        return None
