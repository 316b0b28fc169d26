"""Checkpoints from one format to another and back, and what is refused."""

import importlib.util
import os
import pickle
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.comm.shard_modules import whole_tensors
from tests.parallel.test_checkpoint import expected, save
from tutelx.checkpoints import conversion, convert, formats
from tutelx.checkpoints.state import leaves
from tutelx.cli import main
from tutelx.errors import InvalidTypeError, InvalidValueError

HAS_SAFETENSORS = importlib.util.find_spec("safetensors") is not None
needs_safetensors = pytest.mark.skipif(not HAS_SAFETENSORS, reason="safetensors is not installed")

SPECIAL = torch.tensor([0.0, -0.0, float("inf"), float("nan"), 1e-45, 3.4e38])


def flat_state() -> dict[str, torch.Tensor]:
    shared = torch.arange(6.0)
    return {
        "special": SPECIAL,
        "half": SPECIAL.bfloat16(),
        "transposed": torch.arange(6, dtype=torch.float64).view(2, 3).T,
        "ids": torch.tensor([[-1, 2]], dtype=torch.int32),
        "flag": torch.tensor(True),
        "scalar": torch.tensor(7, dtype=torch.int64),
        "empty": torch.zeros(0, 3),
        "eight.bits": torch.arange(4, dtype=torch.uint8).view(torch.float8_e4m3fn),
        "tied": shared,
        "tied too": shared[:3],
    }


def nested_state() -> dict:
    return {
        "model": flat_state(),
        "optimizer": {
            "state": {"special": {"step": torch.tensor(3.0), "exp_avg": SPECIAL}},
            "param_groups": [{"lr": 0.1, "betas": (0.9, 0.95), "params": ["special"], "maximize": False, "none": None}],
        },
        "epoch": 12,
        "name": "größer",
        "ends": [],
    }


def same(given, wanted, path: str = "") -> None:
    """Bits, dtypes, shapes, keys and their order."""
    assert type(given) is type(wanted), path
    if isinstance(wanted, torch.Tensor):
        assert (given.dtype, given.shape) == (wanted.dtype, wanted.shape), path
        assert given.contiguous().flatten().view(torch.uint8).equal(wanted.contiguous().flatten().view(torch.uint8)), (
            path
        )
    elif isinstance(wanted, dict):
        assert set(given) == set(wanted), path
        for key in wanted:
            same(given[key], wanted[key], f"{path}.{key}")
    elif isinstance(wanted, (list, tuple)):
        assert len(given) == len(wanted), path
        for index, each in enumerate(wanted):
            same(given[index], each, f"{path}.{index}")
    else:
        assert given == wanted, path


def command(*arguments: object) -> int:
    return main(["convert", *map(str, arguments)])


def test_to_a_folder_and_back(tmp_path, capsys):
    torch.save(nested_state(), tmp_path / "a.pt")
    assert command(tmp_path / "a.pt", tmp_path / "folder") == 0
    shown = capsys.readouterr().out
    # Of 10 tensors in the model 6+6+6+2+1+1+0+4+6+3 = 35 elements, and 1 + 6 in the optimizer.
    assert "tensors  12 of bfloat16, bool, float32, float64, float8_e4m3fn, int32, int64: 42 elements" in shown
    # lr, two betas, params, maximize, none; epoch, name, ends.
    assert "values   9" in shown
    assert f"wrote    {tmp_path}/folder (dcp)" in shown
    assert command(tmp_path / "folder", tmp_path / "b.pt") == 0
    same(torch.load(tmp_path / "b.pt"), nested_state())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "b.pt", "folder"]


@needs_safetensors
def test_through_every_format(tmp_path):
    torch.save(flat_state(), tmp_path / "a.pt")
    for source, target in [
        ("a.pt", "b.safetensors"), ("b.safetensors", "c"), ("c", "d.safetensors"), ("d.safetensors", "e.pt"),
    ]:  # fmt: skip
        assert command(tmp_path / source, tmp_path / target) == 0
    same(torch.load(tmp_path / "e.pt"), flat_state())


@needs_safetensors
@pytest.mark.parametrize("source", ["a.pt", "folder"])
def test_a_part(tmp_path, source):
    torch.save(nested_state(), tmp_path / "a.pt")
    assert command(tmp_path / "a.pt", tmp_path / "folder") == 0
    assert command(tmp_path / source, tmp_path / "b.safetensors", "--part", "model") == 0
    same(formats.read(tmp_path / "b.safetensors"), flat_state())


PLAIN = st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | st.text(max_size=3) | st.just((1, "x"))
TENSORS = st.builds(
    lambda shape, dtype: torch.randint(0, 2, shape).to(dtype),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int16, torch.bool, torch.complex64]),
)
KEYS = st.text("ab.é", min_size=1, max_size=3)
STATES = st.recursive(
    TENSORS | PLAIN, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(KEYS, inner, min_size=1, max_size=3)
)


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(KEYS, STATES, min_size=1, max_size=3))
def test_any_state_comes_back_or_is_refused(tmp_path, state):
    torch.save(state, tmp_path / "a.pt")
    names = [name for name, _ in leaves(state)]
    if len(set(names)) < len(names):  # "a.b" beside "a" with "b" inside: one name for two things
        with pytest.raises(InvalidValueError, match="cannot be written"):
            convert(tmp_path / "a.pt", tmp_path / "folder", force=True)
        return
    convert(tmp_path / "a.pt", tmp_path / "folder", force=True)
    convert(tmp_path / "folder", tmp_path / "b.pt", force=True)
    same(torch.load(tmp_path / "b.pt"), torch.load(tmp_path / "a.pt"))


def test_experts_that_two_ranks_saved(ranks, tmp_path):
    ranks(4).run(save, 6, str(tmp_path / "folder"), ranks=(0, 1))
    convert(tmp_path / "folder", tmp_path / "a.pt", part_path="model")
    wanted = expected(6)
    given = torch.load(tmp_path / "a.pt")
    same(
        {name: given[f"experts.{name}"] for name in whole_tensors(6)},
        {n: wanted[f"experts.{n}"] for n in whole_tensors(6)},
    )


def test_nothing_is_overwritten_without_force(tmp_path, capsys):
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pt")
    torch.save({"old": torch.zeros(1)}, tmp_path / "b.pt")
    assert command(tmp_path / "a.pt", tmp_path / "folder") == 0
    for target in ("b.pt", "folder"):
        assert command(tmp_path / "a.pt", tmp_path / target) == 2
        assert "exists already; --force replaces it" in capsys.readouterr().err
    assert list(torch.load(tmp_path / "b.pt")) == ["old"]
    for source, target in [("a.pt", "b.pt"), ("b.pt", "folder")]:
        assert command(tmp_path / source, tmp_path / target, "--force") == 0
    same(formats.read(tmp_path / "folder"), {"a": torch.ones(2)})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "b.pt", "folder"]


def test_a_folder_that_is_no_checkpoint_is_never_replaced(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pt")
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis").touch()
    with pytest.raises(InvalidValueError, match="holds no checkpoint: it will not be replaced"):
        convert(tmp_path / "a.pt", tmp_path / "work", force=True)
    assert (tmp_path / "work" / "thesis").exists()


@pytest.mark.parametrize("target", ["b.pt", "folder"])
def test_an_interrupt_leaves_what_was_there(tmp_path, monkeypatch, target):
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pt")
    convert(tmp_path / "a.pt", tmp_path / target)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(conversion, "_put", lambda *args: signal.raise_signal(signal.SIGINT))
    assert command(tmp_path / "a.pt", tmp_path / target, "--force") == 130
    assert sorted(tmp_path.rglob("*")) == before


def test_empty_dictionaries_are_named(tmp_path, capsys):
    torch.save({"a": torch.ones(1), "b": {"state": {}, "groups": [{"c": {}}]}}, tmp_path / "a.pt")
    assert command(tmp_path / "a.pt", tmp_path / "folder") == 0
    assert "left out b.state, b.groups.0.c: the target cannot hold empty dictionaries" in capsys.readouterr().out


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def metadata_with(folder: Path, change) -> None:
    metadata = dcp.FileSystemReader(folder).read_metadata()
    (folder / ".metadata").write_bytes(pickle.dumps(change(metadata)))


def outside(metadata):
    for entry in metadata.storage_data.values():
        entry.relative_path = "../a.pt"
    return metadata


def test_nothing_that_is_read_runs_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Bomb()}, tmp_path / "a.pt")
    with pytest.raises(InvalidValueError, match=r"a.pt' cannot be read as pt: UnpicklingError: Weights only load"):
        convert(tmp_path / "a.pt", tmp_path / "folder")
    torch.save({"a": torch.ones(1)}, tmp_path / "a.pt")
    convert(tmp_path / "a.pt", tmp_path / "folder")
    good = (tmp_path / "folder" / ".metadata").read_bytes()
    for change, message in [
        (lambda metadata: Bomb(), r"the checkpoint's metadata asks for (posix|nt)\.mkdir, which is no data"),
        (lambda metadata: [1], "holds a list, expected Metadata"),
        (outside, r"the checkpoint points to '\.\./a\.pt', outside its folder"),
    ]:
        (tmp_path / "folder" / ".metadata").write_bytes(good)
        metadata_with(tmp_path / "folder", change)
        with pytest.raises(InvalidValueError, match=message):
            convert(tmp_path / "folder", tmp_path / "b.pt")
    assert not (tmp_path / "exploded").exists()
    dcp.save({"a": Bomb()}, storage_writer=dcp.FileSystemWriter(tmp_path / "bytes"), no_dist=True)
    with pytest.raises(InvalidValueError, match="cannot be read as dcp: UnpicklingError: Weights only load"):
        convert(tmp_path / "bytes", tmp_path / "b.pt")
    assert not (tmp_path / "exploded").exists()


def damaged(tmp_path: Path, name: str) -> Path:
    path = tmp_path / name
    if name == "folder":
        torch.save({"a": torch.ones(1000)}, tmp_path / "good.pt")
        convert(tmp_path / "good.pt", path)
        data = next(path.glob("*.distcp"))
        data.write_bytes(data.read_bytes()[:100])
    elif name == "metadata":
        path.mkdir()
        (path / ".metadata").write_bytes(b"\x80\x04K\x01")
    elif name == "bare":
        path.mkdir()
        (path / "something").touch()
    elif name == "object.pt":
        torch.save([torch.ones(1)], path)
    elif name == "ids.pt":
        torch.save({"state": {0: torch.ones(1)}}, path)
    elif name == "sparse.pt":
        torch.save({"a": {"b": torch.eye(2).to_sparse()}}, path)
    elif name == "cut.pt":
        torch.save({"a": torch.ones(1000)}, path)
        path.write_bytes(path.read_bytes()[:2000])
    elif name != "missing.pt":
        path.write_bytes(b"nonsense")
    return path


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("folder", InvalidValueError, "cannot be read as dcp"),
        ("metadata", InvalidValueError, "cannot be read as dcp"),
        ("bare", InvalidValueError, "holds no checkpoint: it has no file '.metadata'"),
        ("object.pt", InvalidTypeError, "holds a list, expected a dictionary"),
        ("ids.pt", InvalidTypeError, "state has the key 0, expected a str"),
        ("sparse.pt", InvalidTypeError, "a.b is a Tensor of layout torch.sparse_coo, expected a plain tensor"),
        ("cut.pt", InvalidValueError, "cannot be read as pt"),
        ("nonsense.pt", InvalidValueError, "cannot be read as pt"),
        ("missing.pt", InvalidValueError, "does not exist"),
        ("notes.txt", InvalidValueError, "is a file that ends in none of .pt, .pth, .bin, .safetensors"),
        pytest.param("a.safetensors", InvalidValueError, "cannot be read as safetensors", marks=needs_safetensors),
    ],
)
def test_damaged_sources(tmp_path, name, error, message):
    source = damaged(tmp_path, name)
    with pytest.raises(error) as raised:
        convert(source, tmp_path / "target.pt")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not [path for path in tmp_path.iterdir() if "target" in path.name]


def test_wrong_targets(tmp_path):
    torch.save(nested_state(), tmp_path / "a.pt")
    for target, options, message in [
        (tmp_path / "nowhere" / "b.pt", {}, "lies in no folder that exists"),
        (tmp_path / "a.pt", {"force": True}, "source and target are the same"),
        (tmp_path / "b.npz", {}, "ends in none of .pt, .pth, .bin, .safetensors; a folder has no suffix"),
        (
            tmp_path / "b.pt",
            {"part_path": "modle"},
            "the checkpoint holds model, optimizer, epoch, name, ends, not 'modle'",
        ),
        (tmp_path / "b.pt", {"part_path": "epoch"}, "part='epoch' is a int, expected a dictionary"),
        (tmp_path / "b.pt", {"part_path": "epoch.b"}, "epoch holds a int, not 'b'"),
    ]:
        with pytest.raises(InvalidValueError) as raised:
            convert(tmp_path / "a.pt", target, **options)
        assert message in str(raised.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt"]


@needs_safetensors
def test_safetensors_hold_tensors_only(tmp_path):
    torch.save(nested_state(), tmp_path / "a.pt")
    with pytest.raises(InvalidValueError, match="'model' is a dict, and a safetensors file holds tensors only: choose"):
        convert(tmp_path / "a.pt", tmp_path / "b.safetensors")


def test_without_safetensors_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(formats.importlib.util, "find_spec", lambda name: None)
    torch.save({"a": torch.ones(1)}, tmp_path / "a.pt")
    assert command(tmp_path / "a.pt", tmp_path / "b.safetensors") == 2
    assert capsys.readouterr().err == (
        "tutelx convert: safetensors files need the package safetensors: pip install 'tutelx[safetensors]'\n"
    )
