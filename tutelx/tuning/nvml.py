"""What the driver of NVIDIA's cards says of them: names, links, and whether a card is slowed down right now."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

_log = logging.getLogger("tutelx.tuning")

# Bits of nvmlDeviceGetCurrentClocksEventReasons. A card that stays within its power limit is at its usual speed.
_REASONS = {
    0x08: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}
_MOST_LINKS = 18


class Nvml:
    """The card that torch counts as `index`. Without a driver, a permission or the package, nothing is known.

    library: the module `pynvml`. uuid: of the card, as torch says it, which counts visible cards only.
    """

    def __init__(self, library: Any = None, *, index: int = 0, uuid: str | None = None) -> None:
        self._library, self._handle = library, None
        if library is None:
            self._library = _library()
        if self._library is None:
            return
        if not self._ask(lambda: self._library.nvmlInit() or True):
            return
        if uuid is None:
            self._handle = self._ask(lambda: self._library.nvmlDeviceGetHandleByIndex(index))
        else:
            self._handle = self._ask(lambda: self._library.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}"))

    @property
    def found(self) -> bool:
        return self._handle is not None

    def driver(self) -> str:
        """Its version; "" if unknown."""
        value = self._ask(self._library.nvmlSystemGetDriverVersion) if self.found else None
        return value.decode() if isinstance(value, bytes) else value or ""

    def link(self) -> str:
        """How the card reaches others of its node: "nvlink", else "pcie"; "" if unknown."""
        if not self.found:
            return ""
        for link in range(_MOST_LINKS):
            if self._ask(partial(self._library.nvmlDeviceGetNvLinkState, self._handle, link)):
                return "nvlink"
        return "pcie"

    def throttling(self) -> frozenset[str] | None:
        """What slows the card down right now; None if the driver does not say."""
        if not self.found:
            return None
        ask = getattr(self._library, "nvmlDeviceGetCurrentClocksEventReasons", None)
        ask = ask or getattr(self._library, "nvmlDeviceGetCurrentClocksThrottleReasons", None)
        bits = None if ask is None else self._ask(lambda: ask(self._handle))
        return None if bits is None else frozenset(name for bit, name in _REASONS.items() if bits & bit)

    def _ask(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except (self._library.NVMLError, AttributeError, OSError) as error:
            _log.debug("NVML: %s", error)
            return None


def throttled(before: frozenset[str] | None, after: frozenset[str] | None) -> tuple[str, ...]:
    """What slowed a card down at the beginning or the end of a measurement, in order; empty if nothing is known."""
    return tuple(sorted((before or frozenset()) | (after or frozenset())))


def of_device(device: Any) -> Nvml:
    """The card behind a CUDA device of torch."""
    import torch

    index = torch.device(device).index
    index = torch.cuda.current_device() if index is None else index
    uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)
    return Nvml(index=index, uuid=None if uuid is None else str(uuid))


def _library() -> Any:
    try:
        import pynvml
    except ImportError:
        return None
    return pynvml
