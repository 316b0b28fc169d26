"""The fingerprint of this machine, measured once and remembered for the user."""

from __future__ import annotations

import json
import logging
import platform
import threading
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tutelx import __version__, env, machine
from tutelx.errors import DatabaseError, InvalidValueError
from tutelx.tuning import files, probe, strict
from tutelx.tuning.hardware import Hardware

_log = logging.getLogger("tutelx.tuning")

FILE = "hardware.json"
SCHEMA = 1
LONGEST = 2**20

_known: dict[str, Hardware] = {}
_guard = threading.Lock()


def here(device: Any = "cpu", *, folder: Path | None = None) -> Hardware:
    """Of the CPU, or of a CUDA device of torch (the current one if it names none). Links are not looked at.

    The first process of a user measures, for about a tenth of a second; the others read what it wrote into `folder`
    (default: the user's cache). Where nothing can be written every process measures once.
    """
    name = str(device)
    identity, measure = _cuda(name) if name.startswith("cuda") else (_cpu_identity(), probe.cpu)
    with _guard:
        if identity not in _known:
            _known[identity] = _remembered(identity, measure, env.cache_folder() if folder is None else folder)
        return _known[identity]


def _remembered(identity: str, measure: Callable[[], Hardware], folder: Path | None) -> Hardware:
    if folder is None:
        return measure()
    path = folder / FILE
    if (found := _read(path).get(identity)) is not None:
        return found
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with files.locked(path):
            # Another rank of this node may have measured meanwhile.
            known = _read(path)
            found = known.get(identity) or measure()
            if identity not in known:
                _write(path, {**known, identity: found})
    except (DatabaseError, OSError, NotImplementedError) as error:
        _log.debug("%s: the machine is measured for this process alone", error)
    return found or measure()


def _read(path: Path) -> dict[str, Hardware]:
    try:
        with path.open("rb") as file:
            data = file.read(LONGEST + 1)
    except OSError:
        return {}
    try:
        if len(data) > LONGEST:
            raise InvalidValueError(f"longer than {LONGEST} bytes")
        spec = {"schema": strict.integer(SCHEMA, SCHEMA), "machines": _machines}
        return strict.record(strict.document(data), "file", spec, {})["machines"]
    except InvalidValueError as error:
        _log.warning("%s is ignored: %s", path, error)
        return {}


def _machines(value: object, where: str) -> dict[str, Hardware]:
    if not isinstance(value, dict):
        raise InvalidValueError(f"{where}={strict.short(value)} is no object")
    return {name: Hardware.from_json(entry) for name, entry in value.items()}


def _write(path: Path, known: dict[str, Hardware]) -> None:
    value = {"schema": SCHEMA, "machines": {name: known[name].to_json() for name in sorted(known)}}
    files.replace(path, json.dumps(value, indent=1).encode())


def _cpu_identity() -> str:
    cache = max(machine.caches().values(), default=0)
    return f"{machine.cpu_name()}, {platform.machine()}, {machine.usable_cores()} cores, cache {cache}"


def _cuda(name: str) -> tuple[str, Callable[[], Hardware]]:
    import torch

    index = torch.device(name).index
    index = torch.cuda.current_device() if index is None else index
    properties = torch.cuda.get_device_properties(index)
    size = f"{properties.multi_processor_count} multiprocessors, {properties.total_memory} bytes"
    return f"{properties.name}, sm_{properties.major}{properties.minor}, {size}", lambda: probe.cuda(index)


def software(device: Any = "cpu") -> dict[str, str]:
    """Versions that measurements depend on, by name."""
    found = {"tutelx": __version__, "torch": _torch_version(), "python": platform.python_version()}
    if str(device).startswith("cuda"):
        import torch

        if torch.version.cuda:
            found["cuda"] = torch.version.cuda
    return found


def _torch_version() -> str:
    try:
        return version("torch")  # without loading it
    except PackageNotFoundError:
        import torch

        return torch.__version__
