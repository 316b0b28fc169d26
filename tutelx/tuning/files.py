"""Files of records, one a line: read with bounds, appended to and replaced so that nobody sees half a write.

A database is a folder with one folder a machine, and in it one file an op: ROOT/HARDWARE/OP.jsonl.
"""

from __future__ import annotations

import os
import re
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from tutelx.errors import DatabaseError, InvalidValueError
from tutelx.tuning.parse import OP, FutureSchema, from_line, to_line
from tutelx.tuning.records import Record

LONGEST_LINE = 2**20
LARGEST_FILE = 2**28
LOCK_SECONDS = 30.0
_FOLDER = re.compile(r"[a-z0-9_][a-z0-9_-]{0,199}")
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What was skipped, and why. line: from 1; 0: the whole file."""

    path: Path
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}" if self.line else f"{self.path}: {self.reason}"


@dataclass(frozen=True, kw_only=True)
class Contents:
    """A file as far as it can be used. refused: of a later schema, so that none of it is."""

    records: tuple[Record, ...] = ()
    problems: tuple[Problem, ...] = ()
    refused: bool = False


def path_of(root: Path, record: Record) -> Path:
    """Raises InvalidValueError if the record's machine or op makes no name of a file."""
    folder = record.hardware.folder
    if not _FOLDER.fullmatch(folder) or not re.fullmatch(OP, record.op, re.ASCII):
        raise InvalidValueError(f"op={record.op!r} on {folder!r} makes no name of a file")
    return root / folder / f"{record.op}.jsonl"


def files_in(root: Path) -> list[Path]:
    """The files of a database, in order; links that lead out of it, and what has another form of name, are not."""
    try:
        folders = [folder for folder in root.iterdir() if _FOLDER.fullmatch(folder.name)]
    except OSError:
        return []
    found = [path for folder in folders for path in folder.glob("*.jsonl") if _lies_in(root, path)]
    return sorted(path for path in found if re.fullmatch(OP, path.stem, re.ASCII))


def _lies_in(root: Path, path: Path) -> bool:
    try:
        return path.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError):  # a link to itself
        return False


def read(path: Path) -> Contents:
    """Never raises: what cannot be read is a problem."""
    records: list[Record] = []
    problems: list[Problem] = []
    try:
        with _opened(path) as file:
            for number, line in _lines(file):
                try:
                    if line is None:
                        raise InvalidValueError(f"longer than {LONGEST_LINE} bytes")
                    record = from_line(line)
                    if record.hardware.folder != path.parent.name or record.op != path.stem:
                        raise InvalidValueError(f"belongs into {record.hardware.folder}/{record.op}.jsonl")
                    records.append(record)
                except FutureSchema as error:
                    refusal = Problem(path=path, line=number, reason=f"{error}: nothing of this file is used")
                    return Contents(problems=(refusal,), refused=True)
                except InvalidValueError as error:
                    problems.append(Problem(path=path, line=number, reason=str(error)))
    except FileNotFoundError:
        pass
    except OSError as error:
        problems.append(Problem(path=path, line=0, reason=error.strerror or str(error)))
    return Contents(records=tuple(records), problems=tuple(problems))


def append(path: Path, record: Record) -> None:
    """One write at the end, on a line of its own even after a torn one; on the disk when this returns.

    Raises:
        DatabaseError: it could not be written, or others held the file for LOCK_SECONDS.
    """
    with _failures(path, "appended to"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path):
            handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
            try:
                size = os.fstat(handle).st_size
                torn = size > 0 and os.pread(handle, 1, size - 1) != b"\n"
                data = b"\n" * torn + to_line(record)
                try:
                    if os.write(handle, data) < len(data):
                        raise OSError(f"no room for {len(data)} bytes")
                    os.fsync(handle)
                except OSError:
                    with suppress(OSError):  # half a line helps nobody
                        os.ftruncate(handle, size)
                    raise
            finally:
                os.close(handle)


def replace(path: Path, data: bytes) -> None:
    """Puts a whole file in place of another; the caller holds the lock.

    Raises:
        DatabaseError: it could not be written; the file is as it was.
    """
    with _failures(path, "replaced"):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(name)
            raise


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Alone with a file, among processes and threads."""
    try:
        with FileLock(path.with_name(f".{path.name}.lock"), timeout=LOCK_SECONDS, thread_local=False):
            yield
    except Timeout:
        raise DatabaseError(f"{str(path)!r} is held by another process for over {LOCK_SECONDS:g} s") from None


@contextmanager
def _failures(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except DatabaseError:
        raise
    except (OSError, NotImplementedError) as error:
        raise DatabaseError(f"{str(path)!r} cannot be {what}: {getattr(error, 'strerror', None) or error}") from error


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    # Not to wait for the other end of a pipe that somebody put there.
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(handle, "rb") as file:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise OSError("is no file")
        if status.st_size > LARGEST_FILE:
            raise OSError(f"has {status.st_size} bytes, more than {LARGEST_FILE}")
        yield file


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Number and bytes of each line that is not blank; None for one that is too long."""
    number = 0
    while line := file.readline(LONGEST_LINE + 1):
        number += 1
        if len(line) > LONGEST_LINE:
            while not line.endswith(b"\n") and (line := file.readline(LONGEST_LINE)):
                pass
            yield number, None
            continue
        line = line.removeprefix(_BOM) if number == 1 else line
        if line.strip():
            yield number, line
