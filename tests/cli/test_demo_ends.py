"""A demo that does not reach its end leaves a valid report of what it had."""

import signal

import pytest
import torch
from matplotlib.image import imread

import tutelx
from tests.cli.conftest import run_demo
from tutelx.cli._interrupts import held_interrupts
from tutelx.demo import figure, parity, training


def interrupt_at(monkeypatch, owner, name: str, call: int) -> None:
    """Ctrl-C comes while `owner.name` runs for the call-th time."""
    original, calls = getattr(owner, name), []

    def interrupted(*args, **kwargs):
        calls.append(name)
        if len(calls) == call:
            signal.raise_signal(signal.SIGINT)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, interrupted)


@pytest.mark.parametrize(
    ("owner", "name", "call", "parities", "steps"),
    [
        (parity, "compare", 1, 0, []),
        (training.Run, "step", 1, 1, [0, 0]),
        # in turns of four: 4 of one, 4 of the other, 2 of one, and then it comes
        (training.Run, "step", 11, 1, [6, 4]),
        # only the wrapped model looks at its layers: its second step is trained, but not yet recorded
        (training, "_look", 3, 1, [4, 1]),
        (training.Run, "validate", 2, 1, [12, 12]),
    ],
)
def test_an_interrupt_leaves_a_valid_partial_report(monkeypatch, tmp_path, capsys, owner, name, call, parities, steps):
    interrupt_at(monkeypatch, owner, name, call)
    stopped = run_demo(tmp_path)
    figures = stopped.figures
    assert stopped.code == 130
    assert (figures["complete"], figures["ended"]) == (False, "interrupted")
    assert len(figures["parity"]) == parities
    assert [len(losses) for losses in figures["losses"].values()] == steps
    assert [len(layer["plan"]) for layer in figures["layers"]] == [steps[1]] * 2 if steps else True
    assert imread(tmp_path / "report.png").size
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.png"]
    assert "Partial report (interrupted)" in capsys.readouterr().out


def test_an_interrupt_while_the_report_is_written_waits_for_it(monkeypatch, tmp_path):
    interrupt_at(monkeypatch, figure, "draw", 1)
    stopped = run_demo(tmp_path, "--steps", "1")
    assert stopped.code == 130
    assert stopped.figures["complete"]
    assert imread(tmp_path / "report.png").size


def test_a_held_interrupt_comes_at_the_end():
    before, reached = signal.getsignal(signal.SIGINT), []

    def body():
        with held_interrupts():
            signal.raise_signal(signal.SIGINT)
            reached.append(True)

    with pytest.raises(KeyboardInterrupt):
        body()
    assert reached
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.usefixtures("no_picture")
def test_wrapped_numbers_that_differ_fail_before_training(monkeypatch, tmp_path, capsys):
    wrap = tutelx.wrap

    def wrong(module, **options):
        with torch.no_grad():
            module.blocks[1].moe.experts[0].w2.weight.mul_(1 + 1e-6)
        return wrap(module, **options)

    monkeypatch.setattr(tutelx, "wrap", wrong)
    failed = run_demo(tmp_path)
    figures = failed.figures
    assert failed.code == 1
    assert not figures["complete"]
    assert figures["ended"].startswith("failed: float64 differs by more than 1e-10: logits by ")
    assert [found["passed"] for found in figures["parity"]] == [False]
    assert figures["losses"] == {}
    assert "float64 differs by more than 1e-10" in " ".join(capsys.readouterr().out.split())


@pytest.mark.usefixtures("no_picture")
def test_a_loss_that_leaves_the_numbers_stops_the_training(monkeypatch, tmp_path):
    monkeypatch.setattr(training, "_loss", lambda model, batch: next(model.parameters()).sum() * float("nan"))
    failed = run_demo(tmp_path)
    assert failed.code == 1
    assert failed.figures["ended"] == "failed: the loss of the as written model became nan in step 0; try a lower --lr"


@pytest.mark.usefixtures("no_picture")
def test_an_unexpected_error_is_reported_and_raised(monkeypatch, tmp_path):
    def broken(*args):
        raise ZeroDivisionError("broken")

    monkeypatch.setattr(training, "train", broken)
    with pytest.raises(ZeroDivisionError):
        run_demo(tmp_path)
    assert '"failed: ZeroDivisionError: broken"' in (tmp_path / "report.json").read_text()
