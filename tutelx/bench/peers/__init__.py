"""Other libraries' ways, one file a library; each is imported only when asked for."""

from __future__ import annotations

import importlib
from collections.abc import Iterable

import torch

from tutelx.bench.subject import Way

Ways = dict[str, Way]


def find(names: Iterable[str], device: torch.device) -> tuple[dict[str, Ways], dict[str, str]]:
    """Ways by peer and op, and why the other peers are missing."""
    found: dict[str, Ways] = {}
    missing: dict[str, str] = {}
    for name in names:
        try:
            found[name] = importlib.import_module(f"tutelx.bench.peers.{name}").ways(device)
        except ModuleNotFoundError as error:
            missing[name] = f"no module {error.name}"
        # A foreign library may fail to import with anything; it must not take the measurement with it.
        except Exception as error:
            missing[name] = one_line(error)
    return found, missing


def one_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:160]


class UnusableError(Exception):
    """The library is there, but not for this device."""


def need_cuda(device: torch.device) -> None:
    if device.type != "cuda":
        raise UnusableError(f"its kernels need CUDA, device={device.type}")
