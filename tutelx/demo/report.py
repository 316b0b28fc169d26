"""The report of one demo run: one dictionary, which the JSON file, the picture and the tables all show."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import tutelx
from tutelx.demo.parity import Parity
from tutelx.demo.settings import Settings
from tutelx.demo.text import Text
from tutelx.demo.training import BLOCK, WARM_UP, Run
from tutelx.env import omp_wait_policy
from tutelx.machine import cpu_name

SCHEMA = 1
JSON_NAME, PICTURE_NAME = "report.json", "report.png"


@dataclass
class Report:
    """Filled while the demo runs; :meth:`figures` can be asked for at any time and gives what there is so far."""

    settings: Settings
    text: Text | None = None
    parameters: int | None = None
    parity: list[Parity] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    ended: str = "interrupted"

    def figures(self) -> dict[str, Any]:
        """Everything, as plain JSON values. Per-step lists are as long as the steps that were finished."""
        by_name = {run.name: run for run in self.runs}
        return {
            "schema": SCHEMA,
            "complete": self.ended == "finished",
            "ended": self.ended,
            "tutelx": tutelx.__version__,
            "machine": _machine(),
            "flags": asdict(self.settings),
            "text": None if self.text is None else _text(self.text),
            "parameters": self.parameters,
            "parity": [{**asdict(parity), "passed": parity.passed} for parity in self.parity],
            "timing": _timing(self.runs),
            "losses": {name: [step.loss for step in run.steps] for name, run in by_name.items()},
            "validation_loss": {name: run.validation_loss for name, run in by_name.items()},
            "step_seconds": {name: [step.seconds for step in run.steps] for name, run in by_name.items()},
            "layers": [layer for run in self.runs for layer in _layers(run)],
        }


def write(figures: dict[str, Any], folder: Path, draw: Callable[[dict[str, Any], Path], None]) -> None:
    """Writes both files; each is replaced as a whole, so that a reader never meets half of one."""
    folder.mkdir(parents=True, exist_ok=True)
    # One line a key: a reader finds the sections, and a list of numbers does not take a line a number.
    lines = (f"{json.dumps(key)}: {json.dumps(_finite(value), allow_nan=False)}" for key, value in figures.items())
    _replace(folder / JSON_NAME, lambda path: path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8"))
    _replace(folder / PICTURE_NAME, lambda path: draw(figures, path))


def _replace(path: Path, produce: Callable[[Path], object]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        produce(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _machine() -> dict[str, Any]:
    return {
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "omp_wait_policy": omp_wait_policy(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def _text(text: Text) -> dict[str, Any]:
    return {"source": text.source, "training_bytes": len(text.training), "validation_bytes": len(text.validation)}


def _timing(runs: list[Run]) -> dict[str, Any] | None:
    """Medians: a step that another program disturbed must not decide. None before both runs have a counted step."""
    counted = [[step.seconds for step in run.steps][_warm_up(run) :] for run in runs]
    if len(counted) < 2 or not all(counted):
        return None
    medians = {run.name: statistics.median(seconds) for run, seconds in zip(runs, counted)}
    as_written, wrapped = medians.values()
    # How sure the speed-up is: the same ratio once for every pair of blocks that ran one after the other.
    ratios = sorted(
        statistics.median(counted[0][i : i + BLOCK]) / statistics.median(counted[1][i : i + BLOCK])
        for i in range(0, len(counted[1]), BLOCK)
    )
    return {
        "counts": "forward, backward and update; not the batch, not the reading of the runtime's records",
        "median_step_seconds": medians,
        "steps_per_second": {name: 1 / median for name, median in medians.items()},
        "counted_steps": {run.name: len(seconds) for run, seconds in zip(runs, counted)},
        "speed_up": as_written / wrapped,
        "speed_up_quartiles": [ratios[len(ratios) // 4], ratios[(3 * len(ratios)) // 4]],
    }


def _warm_up(run: Run) -> int:
    return WARM_UP if run.settings.steps > 2 * WARM_UP else 0


def _layers(run: Run) -> list[dict[str, Any]]:
    """One entry a layer, each of its figures a list over the steps."""
    names = ("needed_capacity_factor", "dropped", "plan", "source", "reason", "tokens_per_expert")
    return [
        {"name": layer, **{name: [getattr(step.layers[i], name) for step in run.steps] for name in names}}
        for i, (layer, _) in enumerate(run.layers)
    ]


def _finite(value: Any) -> Any:
    """JSON knows no infinity and no NaN: they become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return value
