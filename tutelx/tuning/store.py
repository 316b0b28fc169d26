"""The tuning database: what was measured, from several places, of which the later ones count more."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tutelx import env
from tutelx.errors import DatabaseError, InvalidValueError
from tutelx.tuning import files
from tutelx.tuning.records import Record
from tutelx.tuning.union import Identity, identity, overlay, union

_log = logging.getLogger("tutelx.tuning")

FOLDER = "tuning_db"
PROCESS = "process"


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A place of records. name: "shipped", "site", "user", or what the caller says. root: None: in memory only."""

    name: str
    root: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A record and the layer that counts most of those that hold it; rank: the layer's place, the lowest is 0."""

    record: Record
    layer: str
    rank: int


class Database:
    """Records of all layers, as one set. Files are read when they are first asked for, and again by `reload`.

    layers: those that count less first; above them all is what this process added and could not or should not write.
    """

    def __init__(self, layers: Sequence[Layer] = (), records: Iterable[Record] = ()) -> None:
        names = [layer.name for layer in layers]
        if PROCESS in names or len(set(names)) < len(names):
            raise InvalidValueError(f"layers={names} must differ, and {PROCESS!r} is there anyway")
        self.layers = (*layers, Layer(name=PROCESS))
        self._added: list[Record] = list(records)
        self._fixed: list[Stored] = []
        self._contents: dict[Path, files.Contents] | None = None
        self._all: list[Stored] | None = None
        self._guard = threading.RLock()
        self._appendable: set[Path] = set()  # files that were looked at
        self.version = 0  # grows with every change that this process makes or reads

    @classmethod
    def open(cls) -> Database:
        """What was shipped with tutelx, below the site's (TUTELX_TUNING_DB), below the user's, below this process's."""
        return cls(standard_layers())

    @classmethod
    def of_folders(cls, *roots: Path) -> Database:
        """Of folders that somebody names, later ones counting more."""
        return cls([Layer(name=str(root), root=root) for root in roots])

    @classmethod
    def of_stored(cls, stored: Iterable[Stored]) -> Database:
        """In memory, with what another database has found out about its layers."""
        database = cls()
        database._fixed = list(stored)
        return database

    def records(self) -> list[Stored]:
        """All records that can be used, in a fixed order, one for each identity (`union.identity`)."""
        with self._guard:
            if self._all is None:
                self._all = self._collect()
            return self._all

    @property
    def problems(self) -> list[files.Problem]:
        """What was skipped in the files, and why."""
        with self._guard:
            return [problem for contents in self._read().values() for problem in contents.problems]

    def add(self, record: Record, layer: str = "user") -> None:
        """Keeps a record in this process and, unless layer is "process", appends it to that layer's file.

        Safe among threads and processes; other processes see it when they next read.

        Raises:
            DatabaseError: it was not written; this process has it nevertheless.
            InvalidValueError: there is no such layer.
        """
        root = self._root(layer)
        with self._guard:
            self._added.append(record)
            self._all = None
            self.version += 1
        if layer == PROCESS:
            return
        if root is None:
            raise DatabaseError(f"the layer {layer!r} has no folder here: the record is kept in memory only")
        path = files.path_of(root, record)
        if path not in self._appendable and files.read(path).refused:
            raise DatabaseError(f"{str(path)!r} holds records of a later schema: the record is kept in memory only")
        self._appendable.add(path)
        files.append(path, record)

    def reload(self) -> None:
        """Reads the files anew when they are next asked for."""
        with self._guard:
            self._contents = self._all = None
            self.version += 1

    def _root(self, name: str) -> Path | None:
        for layer in self.layers:
            if layer.name == name:
                return layer.root
        raise InvalidValueError(f"layer={name!r} is none of {[layer.name for layer in self.layers]}")

    def _read(self) -> dict[Path, files.Contents]:
        if self._contents is None:
            paths = [path for layer in self.layers if layer.root is not None for path in files.files_in(layer.root)]
            self._contents = {path: files.read(path) for path in paths}
            for contents in self._contents.values():
                for problem in contents.problems:
                    _warn_once(str(problem))
        return self._contents

    def _collect(self) -> list[Stored]:
        contents = self._read()
        found: dict[Identity, Stored] = {identity(each.record): each for each in self._fixed}
        above = max((each.rank + 1 for each in self._fixed), default=0)
        for rank, layer in enumerate(self.layers, above):
            if layer.name == PROCESS:
                records: Iterable[Record] = self._added
            elif layer.root is not None:
                paths = files.files_in(layer.root)
                records = [record for path in paths if path in contents for record in contents[path].records]
            else:
                continue
            for record in union(records):
                key = identity(record)
                held = found.get(key)
                whole = record if held is None else overlay(held.record, record)
                found[key] = Stored(record=whole, layer=layer.name, rank=rank)
        return list(found.values())


def standard_layers() -> list[Layer]:
    """Shipped, site ("site", then "site2", ... below it), user."""
    site = [
        Layer(name="site" if i == 0 else f"site{i + 1}", root=Path(folder))
        for i, folder in enumerate(env.tuning_databases())
    ]
    cache = env.cache_folder()
    user = Layer(name="user", root=None if cache is None else cache / FOLDER)
    return [Layer(name="shipped", root=shipped_root()), *reversed(site), user]


def shipped_root() -> Path:
    """Beside the modules, where tutelx is installed, else beside the package, where it is run from its sources."""
    package = Path(__file__).parent.parent
    installed = package / FOLDER
    return installed if installed.is_dir() else package.parent / FOLDER


_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned and len(_warned) < 1000:
        _warned.add(message)
        _log.warning("tuning database: %s (skipped)", message)
