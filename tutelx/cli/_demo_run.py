"""The demo from start to report: its phases, their progress bars, and what happens when one does not finish."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import tutelx
from tutelx.cli import FAILURE, INTERRUPTED
from tutelx.cli._interrupts import held_interrupts
from tutelx.demo import figure, model, parity, report, summary, text, training
from tutelx.demo.settings import Settings
from tutelx.env import is_ci
from tutelx.errors import InvalidValueError, ParityError

_EXIT_CODES = {"finished": 0, "interrupted": INTERRUPTED}


def run(settings: Settings, folder: Path, console: Console) -> int:
    """Trains, and leaves a report in `folder` however it ends. Returns the exit code."""
    result = report.Report(settings=settings, text=text.load(settings))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidValueError(f"out={str(folder)!r} cannot be used: {error.strerror}") from None
    with _progress(console) as progress:
        try:
            _train(result, progress, console)
            result.ended = "finished"
        except KeyboardInterrupt:
            result.ended = "interrupted"
        except (ParityError, training.TrainingError) as error:
            result.ended = f"failed: {error}"
        except BaseException as error:
            result.ended = f"failed: {type(error).__name__}: {error}"
            raise
        finally:
            with held_interrupts():
                task = progress.add_task("picture", total=None)
                figures = result.figures()
                report.write(figures, folder, figure.draw)
                progress.update(task, total=1, completed=1)
    for part in summary.results(figures):
        console.print(part)
    console.print(summary.last_line(figures, folder))
    return _EXIT_CODES.get(result.ended, FAILURE)


def _train(result: report.Report, progress: Progress, console: Console) -> None:
    settings = result.settings
    assert result.text is not None
    batches = text.training_batches(result.text, settings)
    held_out = text.validation_batches(result.text, settings)
    as_written = model.build(settings)
    result.parameters = sum(parameter.numel() for parameter in as_written.parameters())
    console.print(summary.opening(result.figures()))

    dtypes = list(dict.fromkeys((settings.dtype, "float64")))
    advance = _bar(progress, "parity", len(dtypes))
    for dtype in dtypes:
        result.parity.append(parity.compare(as_written, dtype, batches[0]))
        advance()
    console.print(summary.parity(result.figures()))
    for found in result.parity:
        if not found.passed:
            raise ParityError(found.failure())

    wrapped = tutelx.wrap(deepcopy(as_written), strict=True)
    result.runs = [
        training.Run("as written", as_written, settings),
        training.Run("wrapped", wrapped, settings),
    ]
    training.train(result.runs, batches, _bar(progress, "training", len(result.runs) * settings.steps))
    advance = _bar(progress, "validation", len(result.runs) * len(held_out))
    for one in result.runs:
        one.validate(held_out, advance)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        auto_refresh=not is_ci(),
    )


def _bar(progress: Progress, name: str, total: int) -> Callable[[], None]:
    task = progress.add_task(name, total=total)
    return lambda: progress.advance(task)
