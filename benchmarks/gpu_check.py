"""make gpu-check: build for the card at hand, run the GPU tests, compute-sanitizer and the benchmarks, say how it went.

    python benchmarks/gpu_check.py [build] [tests] [sanitizer] [bench]

Runs in the interpreter that it is started with and downloads nothing. Stages may run in calls of their own, in this
order; none takes much longer than --minutes. Exit codes: 0 if nothing failed (a sanitizer that does not work is skipped
and says why), 1 if something did, 2 if this machine cannot run it at all.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # this tree, not an installed tutelx

FAILED, CANNOT = 1, 2
SANITIZERS = ("memcheck", "racecheck", "synccheck")
SANITIZER_ERRORS = 86  # the exit code that compute-sanitizer is told to use
TAIL = 40  # lines of a failed command


class CannotRun(Exception):
    """Why this machine is not one to check on."""


@dataclass(frozen=True, kw_only=True)
class Card:
    name: str
    capability: str
    torch: str

    def __str__(self) -> str:
        return (
            f"{self.name} (sm_{self.capability.replace('.', '')}), torch {self.torch}, Python {sys.version.split()[0]}"
        )


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """status: passed, failed or skipped."""

    status: str
    detail: str


@dataclass(frozen=True, kw_only=True)
class Options:
    """results: the folder of the benchmarks' record. minutes: after which a stage is stopped. ops: what to measure."""

    results: Path
    minutes: float
    ops: tuple[str, ...]


Stage = Callable[[Card, Options], Outcome]


def find_card() -> Card:
    missing = absent("torch", "numpy")
    if missing:
        raise CannotRun(f"{sys.executable} lacks {missing}")
    import torch

    if torch.version.cuda is None:
        raise CannotRun(f"torch {torch.__version__} is built without CUDA")
    if not torch.cuda.is_available():
        raise CannotRun(f"torch {torch.__version__} finds no CUDA device")
    major, minor = torch.cuda.get_device_capability(0)
    return Card(name=torch.cuda.get_device_name(0), capability=f"{major}.{minor}", torch=torch.__version__)


def absent(*modules: str) -> str:
    """Those that cannot be imported, for people to read."""
    return ", ".join(name for name in modules if importlib.util.find_spec(name) is None)


def call(command: Sequence[str], minutes: float, **environment: str) -> tuple[int | None, str]:
    """Exit code (None: out of time, and everything it started was ended) and output."""
    print("$", *command, flush=True)
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=60 * minutes)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        return None, output
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, output


def failed(what: str, code: int | None, output: str) -> Outcome:
    print("\n".join(output.splitlines()[-TAIL:]), flush=True)
    reason = "ran out of time" if code is None else f"ended with exit code {code}"
    return Outcome(status="failed", detail=f"{what} {reason}")


def lacks_kernels() -> str | None:
    """Why the extension in the tree cannot be tested on CUDA."""
    test = "torch._C._dispatch_has_kernel_for_dispatch_key('tutelx::encode', 'CUDA')"
    code, output = call([sys.executable, "-c", f"import torch; from tutelx import ops; print({test})"], 2)
    if code != 0:
        return f"tutelx does not load ({last_line(output)}); run the stage build"
    return None if last_line(output) == "True" else "the extension has no CUDA kernels; run the stage build"


def last_line(output: str) -> str:
    return (output.strip().splitlines() or ["no output"])[-1]


# ---- Stages ----------------------------------------------------------------------------------------------------------


def build(card: Card, options: Options) -> Outcome:
    missing = absent("setuptools")
    if missing:
        return Outcome(status="failed", detail=f"{sys.executable} lacks {missing}")
    environment = {"TUTELX_CUDA": "1", "TORCH_CUDA_ARCH_LIST": card.capability}
    notes = [f"for compute capability {card.capability}"]
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        environment["TUTELX_PYTHON_API"] = "0"
        notes.append("without what needs Python.h, which is missing")
    if shutil.which("ninja") is None and absent("ninja"):
        notes.append("without ninja, one file after the other")
    if "MAX_JOBS" not in os.environ:
        environment["MAX_JOBS"] = str(os.cpu_count() or 1)
    code, output = call([sys.executable, "setup.py", "build_ext", "--inplace"], options.minutes, **environment)
    if code != 0:
        return failed("the build", code, output)
    reason = lacks_kernels()
    if reason is not None:
        return Outcome(status="failed", detail=reason)
    return Outcome(status="passed", detail=", ".join(notes))


def tests(card: Card, options: Options) -> Outcome:
    missing = absent("pytest")
    if missing:
        return Outcome(status="failed", detail=f"{sys.executable} lacks {missing}")
    reason = lacks_kernels()
    if reason is not None:
        return Outcome(status="failed", detail=reason)
    code, output = call([sys.executable, "-m", "pytest", "tests/gpu", "-rs", "-p", "no:cacheprovider"], options.minutes)
    if code != 0:
        return failed(f"pytest ({last_line(output)})", code, output)
    for line in output.splitlines():
        if line.startswith("SKIPPED"):
            print(line, flush=True)
    return Outcome(status="passed", detail=last_line(output))


def sanitizer(card: Card, options: Options) -> Outcome:
    """memcheck, racecheck and synccheck on a program that launches every kernel."""
    reason = lacks_kernels()
    if reason is not None:
        return Outcome(status="failed", detail=reason)
    tool = find_sanitizer()
    if tool is None:
        return Outcome(status="skipped", detail="compute-sanitizer is not installed")
    command = [tool, "--error-exitcode", str(SANITIZER_ERRORS), "--tool"]
    trial = "import torch; torch.zeros(1, device='cuda'); torch.cuda.synchronize()"
    code, output = call([*command, "memcheck", sys.executable, "-c", trial], 2)
    if code != 0:
        print("\n".join(output.splitlines()[-TAIL:]), flush=True)
        return Outcome(status="skipped", detail=f"compute-sanitizer does not work here: {last_line(output)}")
    for name in SANITIZERS:
        # Without a cache every tensor is an allocation of its own, and an access behind it shows.
        code, output = call(
            [*command, name, sys.executable, "tests/gpu/launch_all.py"],
            options.minutes / len(SANITIZERS),
            PYTORCH_NO_CUDA_MEMORY_CACHING="1",
        )
        if code != 0 or "every kernel was launched" not in output:
            return failed(name, code, output)
    return Outcome(status="passed", detail=f"{', '.join(SANITIZERS)}: no error")


def find_sanitizer() -> str | None:
    found = shutil.which("compute-sanitizer")
    if found is not None:
        return found
    for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda"):
        path = Path(home or "/nowhere") / "bin" / "compute-sanitizer"
        if path.exists():
            return str(path)
    return None


def bench(card: Card, options: Options) -> Outcome:
    reason = lacks_kernels()
    if reason is not None:
        return Outcome(status="failed", detail=reason)
    from benchmarks import gpu_bench
    from tutelx.errors import InvalidValueError

    try:
        return Outcome(**gpu_bench.run(options.results, options.ops, deadline=time.monotonic() + 60 * options.minutes))
    except InvalidValueError as error:
        return Outcome(status="failed", detail=str(error))


STAGES: dict[str, Stage] = {"build": build, "tests": tests, "sanitizer": sanitizer, "bench": bench}


# ---- The command -----------------------------------------------------------------------------------------------------


def run(stages: Sequence[str], card: Card, options: Options) -> int:
    """A failed build ends it: the stages behind would only test what was built before."""
    rows = []
    for name in [each for each in STAGES if each in stages]:
        print(f"\n== {name} ==", flush=True)
        begin = time.monotonic()
        outcome = STAGES[name](card, options)
        rows.append((name, outcome, time.monotonic() - begin))
        if name == "build" and outcome.status == "failed":
            break
    print(f"\ngpu-check on {card}")
    for name, outcome, seconds in rows:
        print(f"  {name:<10} {outcome.status:<8} {seconds:6.0f} s  {outcome.detail}")
    not_run = [each for each in STAGES if each in stages and each not in {name for name, _, _ in rows}]
    if not_run:
        print(f"  not run: {', '.join(not_run)}")
    return FAILED if any(outcome.status == "failed" for _, outcome, _ in rows) else 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("stages", nargs="*", metavar="stage", help=f"of {', '.join(STAGES)} (default: all)")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", metavar="DIR")
    parser.add_argument("--minutes", type=float, default=9.0, help="a stage is stopped after these (default: 9)")
    parser.add_argument("--ops", nargs="+", default=(), metavar="OP", help="benchmarks to run (default: all)")
    given = parser.parse_args(arguments)
    unknown = [stage for stage in given.stages if stage not in STAGES]
    if unknown:
        parser.error(f"stage {unknown[0]!r} is none of {', '.join(STAGES)}")
    try:
        card = find_card()
    except CannotRun as reason:
        print(f"gpu-check cannot run here: {reason}", file=sys.stderr)
        return CANNOT
    options = Options(results=given.results, minutes=given.minutes, ops=tuple(given.ops))
    return run(given.stages or list(STAGES), card, options)


if __name__ == "__main__":
    sys.exit(main())
