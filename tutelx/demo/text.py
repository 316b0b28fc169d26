"""What the demo trains on: English that every Python carries, or a file, cut into batches by seed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from tutelx.demo.settings import Settings
from tutelx.errors import InvalidValueError

VALIDATION_SHARE = 20  # one part in 20 is held out
VALIDATION_BATCHES = 8


@dataclass(frozen=True, kw_only=True)
class Text:
    """The bytes, and how many at the end are held out for validation."""

    source: str
    data: torch.Tensor
    held_out: int

    @property
    def training(self) -> torch.Tensor:
        return self.data[: -self.held_out]

    @property
    def validation(self) -> torch.Tensor:
        return self.data[-self.held_out :]


def load(settings: Settings) -> Text:
    """Raises InvalidValueError if the file cannot be read or is too short."""
    if settings.text is None:
        source, raw = "pydoc_data.topics", _python_documentation()
    else:
        source = settings.text
        try:
            raw = Path(settings.text).read_bytes()
        except OSError as error:
            raise InvalidValueError(f"text={settings.text!r} cannot be read: {error.strerror}") from None
    window = settings.seq + 1
    if len(raw) < 2 * window:
        raise InvalidValueError(
            f"text={source!r} has {len(raw)} bytes, but seq={settings.seq} needs at least {2 * window}"
        )
    held_out = max(window, len(raw) // VALIDATION_SHARE)
    return Text(source=source, data=torch.frombuffer(bytearray(raw), dtype=torch.uint8), held_out=held_out)


def _python_documentation() -> bytes:
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics)).encode()


class Batches:
    """Batch i is a function of the seed and i alone: both runs read the same."""

    def __init__(self, data: torch.Tensor, settings: Settings, count: int, *, seed: int) -> None:
        self._data, self._seq = data, settings.seq
        generator = torch.Generator().manual_seed(seed)
        self._starts = torch.randint(len(data) - settings.seq, (count, settings.batch), generator=generator)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(bytes [B, S], the byte that follows each [B, S])."""
        rows = torch.stack([self._data[start : start + self._seq + 1] for start in self._starts[i].tolist()]).long()
        return rows[:, :-1], rows[:, 1:]


def training_batches(text: Text, settings: Settings) -> Batches:
    return Batches(text.training, settings, settings.steps, seed=settings.seed)


def validation_batches(text: Text, settings: Settings) -> Batches:
    return Batches(text.validation, settings, VALIDATION_BATCHES, seed=settings.seed)
