"""One tiny demo, run in this process."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.threads import one_thread
from tutelx.cli import main
from tutelx.demo import figure
from tutelx.demo.settings import Settings

TINY = Settings(
    steps=12, experts=4, top_k=2, dim=16, layers=2, hidden=16, batch=2, seq=16, lr=1e-2, seed=3, dtype="float64"
)
FLAGS = [
    *("--steps", "12", "--experts", "4", "--top-k", "2", "--dim", "16", "--layers", "2", "--hidden", "16"),
    *("--batch", "2", "--seq", "16", "--lr", "1e-2", "--seed", "3", "--dtype", "float64"),
]


@dataclass(frozen=True)
class Demo:
    code: int
    folder: Path

    @property
    def figures(self) -> dict:
        return json.loads((self.folder / "report.json").read_text(), parse_constant=_not_json)


def _not_json(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def run_demo(folder: Path, *flags: str) -> Demo:
    return Demo(code=main(["demo", *FLAGS, "--out", str(folder), *flags]), folder=folder)


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a test that is not about the picture, which takes most of a tiny demo's time."""
    monkeypatch.setattr(figure, "draw", lambda figures, path: path.write_bytes(b""))


@pytest.fixture(scope="package")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """The tiny demo, run to its end."""
    return run_demo(tmp_path_factory.mktemp("finished") / "out")
