"""What `tutelx doctor --model` shows: the layers of a model of transformers, and what wrap would do with each."""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from tutelx.cli import FAILURE
from tutelx.errors import InvalidValueError
from tutelx.wrapping import WrapReport, explain


def run(model: str, console: Console) -> int:
    """Exit code 1 if an MoE layer would be left alone, or there is none."""
    with console.status(f"building {model} without its weights"):
        built = build(model)
        reports = explain(built)
    if not reports:
        console.print(f"{type(built).__name__}: nothing in it looks like an MoE layer")
        return FAILURE
    console.print(table(type(built).__name__, reports))
    if any("numbers not compared" in str(report) for report in reports):
        console.print("No weight was loaded: wrap compares the numbers on the loaded model before it switches a layer.")
    return 0 if all(report.recognised for report in reports) else FAILURE


def table(name: str, reports: list[WrapReport]) -> Table:
    """One row for the layers that differ in nothing but their index."""
    counts = Counter((_pattern(report.name), report.kind, report.recognised, _text(report)) for report in reports)
    out = Table(title=name, title_justify="left", show_edge=False)
    for column in ("layers", "class", "number", "wrapped", "what it computes, or why not"):
        out.add_column(column, overflow="fold")
    for (where, kind, recognised, text), count in counts.items():
        out.add_row(where, kind, str(count), "[green]yes[/]" if recognised else "[bold red]no[/]", text)
    return out


def _pattern(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) or "the model itself"


def _text(report: WrapReport) -> str:
    return str(report.spec) if report.recognised else f"`{report.attribute}` {report.reason}"


def build(model: str) -> nn.Module:
    """On the meta device, so that the largest model costs nothing."""
    if importlib.util.find_spec("transformers") is None:
        raise InvalidValueError(f"model={model!r} needs transformers, which is not installed")
    path = Path(model)
    if not (path.is_file() or (path / "config.json").is_file()):
        raise InvalidValueError(f"model={model!r} is neither a config.json nor a folder with one")
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(path)
        with torch.device("meta"):
            return _class_of(config, transformers)(config)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise InvalidValueError(f"model={model!r} cannot be built: {type(error).__name__}: {reason}") from error


def _class_of(config: Any, transformers: Any) -> Any:
    for name in config.architectures or ():
        if (kind := getattr(transformers, name, None)) is not None:
            return kind
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModel):
        if type(config) in auto._model_mapping:
            return auto.from_config
    raise InvalidValueError(f"architectures={config.architectures} names no class of transformers")
