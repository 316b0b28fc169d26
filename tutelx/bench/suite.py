"""A whole run: every op at every shape in every dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from tutelx.bench import peers
from tutelx.bench.machine import last_level_cache
from tutelx.bench.rows import Row, measure
from tutelx.bench.settings import Settings
from tutelx.bench.shapes import Shape
from tutelx.bench.subjects import SUBJECTS
from tutelx.bench.timing import clock_for
from tutelx.errors import InvalidValueError


@dataclass
class Suite:
    """rows fill while it runs; an interrupt leaves those that were measured."""

    settings: Settings
    device: torch.device
    rows: list[Row] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, settings: Settings) -> Suite:
        found = "cuda" if torch.cuda.is_available() else "cpu"
        if settings.device == "cuda" and found == "cpu":
            raise InvalidValueError("device='cuda', but torch finds no CUDA device")
        return cls(settings, torch.device(settings.device or found))

    def plan(self) -> list[tuple[str, Shape, str]]:
        settings = self.settings
        return [(op, shape, dtype) for op in settings.ops for shape in settings.shapes for dtype in settings.dtypes]

    def run(self, before: Callable[[str], None], after: Callable[[Row], None]) -> None:
        """Calls `before` with the name of each row, and `after` with the row."""
        with _threads(self.settings.threads):
            found, self.missing = peers.find(self.settings.peers, self.device)
            for op, shape, dtype in self.plan():
                before(f"{op} {shape} {dtype}")
                row = measure(
                    SUBJECTS[op],
                    shape,
                    dtype,
                    device=self.device,
                    peers={name: ways[op] for name, ways in found.items() if op in ways},
                    seconds=self.settings.seconds,
                    clock=clock_for(self.device, last_level_cache(self.device)),
                )
                self.rows.append(row)
                after(row)


@contextmanager
def _threads(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
