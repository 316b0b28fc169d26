"""`tutelx db`, verb by verb, on databases by hand."""

import argparse
from dataclasses import replace

import pytest
from matplotlib.image import imread
from rich.console import Console

from tests.tuning.cases import BMM, GROUPED, HERE, SOFTWARE, candidate, key, on, record, write
from tutelx.cli import _db_change, _db_explain, _db_verify, main
from tutelx.errors import InvalidValueError
from tutelx.tuning.parse import to_line
from tutelx.tuning.store import Database

WORKLOAD = "T=1024,K=2,E=8,M=64,H=128,threads=2,experts=ffn"


@pytest.fixture(autouse=True)
def _made_up(monkeypatch):
    for module in (_db_explain, _db_verify):
        monkeypatch.setattr(module, "here", lambda device="cpu": HERE)
    for module in (_db_explain, _db_verify, _db_change):
        monkeypatch.setattr(module, "software", lambda device="cpu": SOFTWARE)


def run(*arguments) -> int:
    return main(["db", *map(str, arguments)])


def stored(root):
    return [each.record for each in Database.of_folders(root).records()]


def test_show(tmp_path, capsys):
    write(tmp_path, record(candidate(BMM, 0.5)), record(at=key(tokens=64), seconds=2e-3))
    path = write(tmp_path, record(hardware=on(HERE, units=64, aliases={"cpu": "[red]other"})))
    path.write_bytes(path.read_bytes() + b"[bold]\n")
    assert run("show", "--db", tmp_path) == 0
    shown = capsys.readouterr().out
    assert "T1024 K2 load 1 E8 M64 H128 float32 training" in shown
    assert "padded/bmm" in shown
    assert "+100%" in shown
    assert "2 ms" in shown
    assert "[red]other" in shown
    assert "3 records of 2 keys" in shown
    assert f"{path}:2: no JSON" in shown
    assert run("show", "--db", tmp_path, "--hardware", HERE.folder) == 0
    assert "2 records of 2 keys" in capsys.readouterr().out
    assert run("show", "--db", tmp_path, "--hardware", "tpu") == 2
    assert "hardware='tpu' is not in the database, which has cpu-x86_64-avx512-2c-32m" in capsys.readouterr().err
    assert run("show", "--db", tmp_path / "none") == 2


def test_show_of_nothing_says_where_it_looked(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TUTELX_TUNING_DB", str(tmp_path / "site"))
    assert run("show", "--db", tmp_path) == 0
    assert "0 records" in capsys.readouterr().out
    write(tmp_path / "site", record())
    assert run("show") == 0
    assert "site" in capsys.readouterr().out


def test_explain(tmp_path, capsys):
    wrong = candidate(GROUPED, 0.4, status="wrong", error=1.0)
    write(tmp_path, record(candidate(BMM, 0.5, 4e-3), wrong, seconds=4e-3))
    assert run("explain", WORKLOAD, "--db", tmp_path) == 0
    shown = capsys.readouterr().out
    assert "-> exact   padded/bmm: 0.50 of the default's time; measured for this key" in shown
    assert "its results were wrong" in shown
    assert "answer    padded/bmm, from tier exact; time of a call: 2 ms" in shown
    assert run("explain", WORKLOAD.replace("1024", "1280"), "--db", tmp_path) == 0
    shown = capsys.readouterr().out
    assert "   exact   this key was not measured here" in shown
    assert "-> nearest padded/bmm" in shown
    assert run("explain", WORKLOAD + ",dtype=bfloat16", "--db", tmp_path) == 0
    shown = capsys.readouterr().out
    assert "   nearest nothing of this kind was measured on such a machine" in shown
    assert "from tier default" in shown or "from tier model" in shown


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("T=512", "has no K"),
        ("T=512,T=1", "'T' is given twice"),
        ("T=0,K=1", "T='0' is not a whole number"),
        ("T=1e3,K=1", "T='1e3' is not"),
        ("X=1", "'X' is none of"),
        ("T=8,K=9,E=8,M=8,H=8", "K=9 exceeds E=8"),
        ("T=8,K=1,E=8,M=8,H=8,dtype=int8", "dtype='int8'"),
        ("T=8,K=1,E=8,M=8,H=8,load=nan", "load='nan'"),
        ("T=8,K=1,E=8,M=8,H=8,device=tpu", "device='tpu'"),
    ],
)
def test_workloads_that_are_none(text, message, tmp_path, capsys):
    assert run("explain", text, "--db", tmp_path) == 2
    assert message in capsys.readouterr().err


def test_merge_is_a_union_in_any_order(tmp_path, capsys):
    write(tmp_path / "a", record(candidate(BMM, 0.5, n=3)), record(at=key(tokens=64)))
    write(tmp_path / "b", record(candidate(BMM, 0.7, n=30), candidate(GROUPED, 0.9)))
    assert run("merge", tmp_path / "a", tmp_path / "b", tmp_path / "ab") == 0
    assert "2 records read, 2 of them new" in capsys.readouterr().out
    assert run("merge", tmp_path / "b", tmp_path / "ba") == 0
    assert run("merge", tmp_path / "a", tmp_path / "ba") == 0
    both = stored(tmp_path / "ab")
    assert [to_line(each) for each in both] == [to_line(each) for each in stored(tmp_path / "ba")]
    assert {each.ratio for r in both for each in r.candidates} == {1.0, 0.7, 0.9}
    before = {path: path.read_bytes() for path in (tmp_path / "ab").rglob("*.jsonl")}
    assert run("merge", tmp_path / "a", tmp_path / "b", tmp_path / "ab") == 0
    assert {path: path.read_bytes() for path in before} == before


def test_merge_keeps_what_is_good_and_says_what_is_not(tmp_path, capsys):
    path = write(tmp_path / "a", record())
    path.write_bytes(b"broken\n" + path.read_bytes())
    assert run("merge", tmp_path / "a", tmp_path / "b") == 1
    assert len(stored(tmp_path / "b")) == 1
    assert f"{path}:1: no JSON" in capsys.readouterr().out
    later = write(tmp_path / "c", record())
    later.write_bytes(later.read_bytes().replace(b'"schema":1', b'"schema":7'))
    before = later.read_bytes()
    assert run("merge", tmp_path / "b", tmp_path / "c") == 2
    assert "later schema" in capsys.readouterr().err
    assert later.read_bytes() == before


def test_diff(tmp_path, capsys):
    write(tmp_path / "a", record(candidate(BMM, 0.5)), record(at=key(tokens=64)), record(at=key(tokens=32)))
    write(tmp_path / "b", record(candidate(BMM, 1.5)), record(at=key(tokens=64), seconds=1.05), record(at=key(top_k=1)))
    assert run("diff", tmp_path / "a", tmp_path / "b") == 0
    shown = capsys.readouterr().out
    assert "2 keys in both, of which 1 differ" in shown
    assert "padded/bmm (0.50)" in shown
    assert "1 keys only in A" in shown
    assert "T32 K2" in shown
    assert "T1024 K1" in shown
    assert run("diff", tmp_path / "a", tmp_path / "b", "--tolerance", "1.01") == 0
    assert "of which 2 differ" in capsys.readouterr().out
    assert run("diff", tmp_path / "a", tmp_path / "b", "--tolerance", "nan") == 2


def test_prune(tmp_path, capsys):
    old = {**SOFTWARE, "torch": "2.9.0"}
    path = write(
        tmp_path,
        record(candidate(BMM, 0.5, n=3)),
        record(candidate(BMM, 0.7, n=30)),
        record(software=old),
        record(at=key(tokens=64), software=old),
    )
    path.write_bytes(path.read_bytes() + b"torn")
    later = write(tmp_path, record(hardware=on(HERE, units=64)))
    later.write_bytes(later.read_bytes().replace(b'"schema":1', b'"schema":7'))
    before = path.read_bytes(), later.read_bytes()
    assert run("prune", "--db", tmp_path, "--dry-run") == 1
    shown = capsys.readouterr().out
    assert "would drop 1 broken lines, 1 measured again, 1 of other versions; 2 records stay" in shown
    assert "left alone" in shown
    assert (path.read_bytes(), later.read_bytes()) == before
    assert run("prune", "--db", tmp_path) == 1
    assert later.read_bytes() == before[1]
    database = Database.of_folders(tmp_path)
    assert [problem.path for problem in database.problems] == [later]
    assert sorted((r.record.key.tokens, r.record.software["torch"]) for r in database.records()) == [
        (64, "2.9.0"),
        (1024, "2.13.0+cpu"),
    ]
    assert run("prune", "--db", tmp_path, "--stale") == 1
    assert [each.key.tokens for each in stored(tmp_path)] == [1024]


def test_plot(tmp_path, capsys):
    for tokens, ratio in ((64, 0.5), (256, 0.9), (1024, 1.4)):
        write(tmp_path, record(candidate(BMM, ratio), candidate(GROUPED, 2.0, status="slow"), at=key(tokens=tokens)))
    write(tmp_path, record(at=key(dtype="bfloat16")))
    assert run("plot", tmp_path / "a.png", "--db", tmp_path) == 0
    assert imread(tmp_path / "a.png").shape[1] > 1000
    assert run("plot", tmp_path, "--db", tmp_path) == 2
    (tmp_path / "empty").mkdir()
    assert run("plot", tmp_path / "a.png", "--db", tmp_path / "empty") == 2


def verify(root, measure, **change):
    args = {"db": [root], "keys": 5, "seconds": 0.1, "seed": 0, "tolerance": 1.25, **change}
    console = Console(width=200)
    return _db_verify.verify(argparse.Namespace(**args), console, measure)


def test_verify(tmp_path, capsys):
    write(tmp_path, record(candidate(BMM, 0.5)), record(at=key(tokens=64)), record(at=key(world=2)))
    write(tmp_path, record(candidate(BMM, 0.5), hardware=on(HERE, units=64)))
    measured = []

    def again(ratio, **change):
        def measure(of, plans, *, seconds):
            measured.append((of.tokens, plans, seconds))
            return record(candidate(BMM, ratio, **change), at=of)

        return measure

    assert verify(tmp_path, again(0.6)) == 0
    # Only this machine's, on one rank; what each was measured with: the best plan.
    assert sorted(tokens for tokens, _, _ in measured) == [64, 1024]
    assert {str(plans[0]) for tokens, plans, _ in measured if tokens == 1024} == {"padded/bmm"}
    assert "1.20" in capsys.readouterr().out
    assert verify(tmp_path, again(0.7)) == 1
    assert "drifted" in capsys.readouterr().out
    assert verify(tmp_path, again(0.7), tolerance=1.5) == 0
    assert verify(tmp_path, again(0.1, status="wrong")) == 1
    measured.clear()
    assert verify(tmp_path, again(0.5), keys=1) == 0
    assert [tokens for tokens, _, _ in measured] == [1024]  # the default cannot be lost
    with pytest.raises(InvalidValueError, match="keys=0"):
        verify(tmp_path, again(0.5), keys=0)


def test_verify_of_what_cannot_be_measured(tmp_path, capsys):
    write(tmp_path, replace(record(candidate(BMM, 0.5)), key=key(expert_numbers=7)))
    assert verify(tmp_path, None) == 0
    assert "not measured" in capsys.readouterr().out
