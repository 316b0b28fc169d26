"""Becomes one rank's program, bound to a NUMA node: what `launcher.run` starts as every rank.

    python -m tutelx.integrations.tutel.launcher.execl [-m MODULE | SCRIPT.py | COMMAND] ...

With more than one OpenMP thread a rank the CPUs are left as they are; NUMA_TYPE=0 leaves them too. TUTEL_CUDA_SANDBOX=2
shows the rank its own GPU only.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from tutelx import env
from tutelx.errors import InvalidValueError, TutelxError

USAGE, NOT_FOUND, NOT_EXECUTABLE = 2, 127, 126


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Replaces this process by `argv`, by default the command line. Exit codes without a program are those of a shell:
    2 wrong use, 126 not executable, 127 not found."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        command = command_of(words)
        local_rank = env.local_rank()
        if env.omp_threads() == 1 and env.numa_type() > 0 and env.cuda_sandbox() != 1:
            from tutelx.integrations.tutel.system.affinity import bind

            bind(local_rank // env.numa_type())
        env.enter_sandbox(local_rank)
    except TutelxError as error:
        _end(error, USAGE)
    try:
        os.execvp(command[0], command)
    except FileNotFoundError as error:
        _end(f"{command[0]!r}: {error.strerror}", NOT_FOUND)
    except OSError as error:
        _end(f"{command[0]!r}: {error.strerror}", NOT_EXECUTABLE)


def command_of(words: Sequence[str]) -> list[str]:
    """This interpreter runs `-m MODULE` and Python files; anything else is a command of its own.

    Raises:
        InvalidValueError: there is none.
    """
    if not words or list(words) == ["-m"]:
        raise InvalidValueError("there is no program: give its path, or -m and its module")
    python = words[0] == "-m" or words[0].endswith(".py")
    return [sys.executable, *words] if python else list(words)


def _end(why: object, code: int) -> NoReturn:
    sys.stderr.write(f"launcher.execl: {why}\n")
    raise SystemExit(code)


if __name__ == "__main__":
    main()
