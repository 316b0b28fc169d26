"""Starts LOCAL_SIZE ranks of a program on this host, or on each host that `mpiexec` starts this on.

    python -m tutelx.integrations.tutel.launcher.run train.py --batch_size=16
    mpiexec -host A,B -x MASTER_ADDR=A -x LOCAL_SIZE=8 python -m tutelx.integrations.tutel.launcher.run -m my.module

The exit code is that of the rank that failed first, 128 + n if signal n ended it, and 0 if none failed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from tutelx import env
from tutelx.errors import InvalidValueError, TutelxError

USAGE, SIGNAL, INTERRUPTED = 2, 128, 130
EXECL = "tutelx.integrations.tutel.launcher.execl"
_PORT = 23232


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `argv`, by default the command line; returns the exit code."""
    program = list(sys.argv[1:] if argv is None else argv)
    try:
        arguments = torchrun_arguments(program)
    except TutelxError as error:
        sys.stderr.write(f"{EXECL.removesuffix('.execl')}.run: {error}\n")
        return USAGE
    return _launch(arguments)


def torchrun_arguments(program: Sequence[str]) -> list[str]:
    """What torchrun is given, from the environment: LOCAL_SIZE, MASTER_ADDR, MASTER_PORT, and Open MPI's variables.

    A single host without a port takes a free one, so that jobs do not meet each other. OMP_NUM_THREADS, unless it is
    set, becomes this rank's share of the CPUs.

    Raises:
        InvalidValueError: no program, several hosts without MASTER_ADDR, a variable that is no number.
    """
    if not program or program == ["-m"]:
        raise InvalidValueError("there is no program: give its path, or -m and its module")
    local = env.local_size() or 1
    rank, hosts, _ = env.mpi_place() or (0, 1, 0)
    address, port = env.master()
    if hosts > 1 and address is None:
        raise InvalidValueError(f"MASTER_ADDR is not set, and mpiexec started {hosts} hosts: give -x MASTER_ADDR=")
    env.default_threads(max(1, (os.cpu_count() or 1) // local))
    where = [f"--nproc-per-node={local}"]
    if hosts == 1 and port is None:
        where += ["--standalone"]
    else:
        where += [f"--nnodes={hosts}", f"--node-rank={rank}", f"--master-addr={address or 'localhost'}"]
        where += [f"--master-port={port or _PORT}"]
    return [*where, "-m", EXECL, *program]


def _launch(arguments: list[str]) -> int:
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        run.run(run.parse_args(arguments))
    except ChildFailedError as error:
        sys.stderr.write(f"{error}\n")
        code = error.get_first_failure()[1].exitcode
        return SIGNAL - code if code < 0 else code
    except SignalException as error:
        return SIGNAL + error.sigval
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
