"""`tutelx demo` from its flags to its report, at tiny sizes."""

import struct

import pytest
from matplotlib.image import imread

from tests.cli.conftest import run_demo
from tutelx.cli import main

TOKENS, CHOICES, EXPERTS, STEPS, LAYERS = 2 * 16, 2, 4, 12, 2
RUNS = ["as written", "wrapped"]


def test_it_finishes_and_the_report_has_its_schema(finished):
    figures = finished.figures
    assert finished.code == 0
    assert list(figures) == [
        *("schema", "complete", "ended", "tutelx", "machine", "flags", "text", "parameters", "parity", "timing"),
        *("losses", "validation_loss", "step_seconds", "layers"),
    ]
    assert (figures["schema"], figures["complete"], figures["ended"]) == (1, True, "finished")
    assert figures["flags"]["steps"] == STEPS
    assert figures["flags"]["dtype"] == "float64"
    assert figures["text"]["source"] == "pydoc_data.topics"
    assert figures["text"]["training_bytes"] > 400_000
    assert sorted(path.name for path in finished.folder.iterdir()) == ["report.json", "report.png"]


def test_the_picture_is_a_png(finished):
    path = finished.folder / "report.png"
    start = path.read_bytes()[:24]
    width, height = struct.unpack(">II", start[16:])
    assert start[:8] == b"\x89PNG\r\n\x1a\n"
    assert imread(path).shape[:2] == (height, width)
    assert width > 1000


def test_both_models_agree_before_and_in_training(finished):
    figures = finished.figures
    (parity,) = figures["parity"]
    assert (parity["dtype"], parity["tolerance"], parity["passed"]) == ("float64", 1e-10, True)
    # embedding, head, last norm; a block: two norms, two of attention, gate, three of each expert
    assert parity["gradients"] == 3 + LAYERS * (5 + 3 * EXPERTS)
    assert list(figures["losses"]) == list(figures["validation_loss"]) == RUNS
    as_written, wrapped = figures["losses"].values()
    assert len(as_written) == STEPS
    assert wrapped == pytest.approx(as_written, rel=1e-8)
    assert as_written[-1] < as_written[0] - 0.2
    held_out = figures["validation_loss"]
    assert held_out["wrapped"] == pytest.approx(held_out["as written"], rel=1e-8)


def test_every_layer_call_of_the_wrapped_model_is_recorded(finished):
    layers = finished.figures["layers"]
    assert [layer["name"] for layer in layers] == ["blocks.0.moe", "blocks.1.moe"]
    for layer in layers:
        assert {len(values) for name, values in layer.items() if name != "name"} == {STEPS}
        for load, needed in zip(layer["tokens_per_expert"], layer["needed_capacity_factor"]):
            assert len(load) == EXPERTS
            assert sum(load) == TOKENS * CHOICES
            assert needed == pytest.approx(max(load) * EXPERTS / (TOKENS * CHOICES))
        assert layer["dropped"] == [0] * STEPS
        assert all(plan.startswith("ragged/") for plan in layer["plan"])
        assert all(layer["source"])
        assert all(layer["reason"])


def test_timing_is_that_of_the_counted_steps(finished):
    figures = finished.figures
    timing = figures["timing"]
    for name in RUNS:
        assert timing["counted_steps"][name] == STEPS - 4
        assert min(figures["step_seconds"][name]) <= timing["median_step_seconds"][name]
        assert timing["steps_per_second"][name] == pytest.approx(1 / timing["median_step_seconds"][name])
    assert timing["speed_up"] == pytest.approx(
        timing["steps_per_second"]["wrapped"] / timing["steps_per_second"]["as written"]
    )


@pytest.mark.usefixtures("no_picture")
def test_one_seed_gives_the_same_bits_twice(finished, tmp_path):
    first, second = finished.figures, run_demo(tmp_path).figures
    for name in ("losses", "validation_loss", "layers", "parity"):
        assert second[name] == first[name]


@pytest.mark.usefixtures("no_picture")
def test_another_seed_gives_another_run(finished, tmp_path):
    other = run_demo(tmp_path, "--seed", "4", "--steps", "1").figures
    assert other["losses"]["wrapped"][0] != finished.figures["losses"]["wrapped"][0]


@pytest.mark.usefixtures("no_picture")
def test_it_prints_parity_first_and_the_folder_last(tmp_path, capsys):
    run_demo(tmp_path / "here", "--steps", "2", "--dtype", "float32")
    shown = capsys.readouterr().out
    order = ["M parameters", "Parity before training", "float64", "Loss", "Training speed", "speed-up", "saw", "did"]
    assert sorted(order, key=shown.index) == order
    assert "".join(shown.split()).endswith(f"{tmp_path}/here/(report.json,report.png)".replace(" ", ""))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.usefixtures("no_picture")
def test_other_dtypes_train(dtype, tmp_path):
    done = run_demo(tmp_path, "--dtype", dtype, "--steps", "2")
    assert done.code == 0
    assert [parity["dtype"] for parity in done.figures["parity"]] == [dtype, "float64"]


@pytest.mark.usefixtures("no_picture")
def test_a_text_of_ones_own(tmp_path):
    text = tmp_path / "text"
    text.write_bytes(b"abcdefgh" * 100)
    figures = run_demo(tmp_path / "out", "--text", str(text), "--steps", "1").figures
    assert figures["text"] == {"source": str(text), "training_bytes": 760, "validation_bytes": 40}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--top-k", "9", "--experts", "8"], "top_k=9 exceeds experts=8"),
        (["--steps", "0"], "steps=0 must be at least 1"),
        (["--dim", "12"], "dim=12 is not a multiple of 8"),
        (["--lr", "nan"], "lr=nan must be positive and finite"),
        (["--seed", "-1"], "seed=-1 is outside"),
        (["--ranks", "0"], "ranks=0 must be at least 1"),
        (["--ranks", "2"], "--ranks 2 is known, but arrives with expert parallelism; run without it"),
        (["--text", "no such file"], "text='no such file' cannot be read"),
    ],
)
def test_a_flag_that_cannot_be_used_is_named(flags, message, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["demo", "--out", str(out), *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_a_text_that_is_too_short_is_named(tmp_path, capsys):
    text = tmp_path / "text"
    text.write_bytes(b"x" * 33)
    assert main(["demo", "--text", str(text), "--seq", "16", "--out", str(tmp_path / "out")]) == 2
    assert "has 33 bytes, but seq=16 needs at least 34" in capsys.readouterr().err


def test_an_output_folder_that_is_a_file_is_named(tmp_path, capsys):
    taken = tmp_path / "taken"
    taken.write_text("mine")
    assert main(["demo", "--out", str(taken)]) == 2
    assert "cannot be used" in capsys.readouterr().err
    assert taken.read_text() == "mine"
