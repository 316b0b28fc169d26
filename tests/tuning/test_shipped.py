"""What is shipped with tutelx can be used, says where it comes from, and holds nothing twice."""

from collections import Counter
from datetime import datetime
from pathlib import Path

import pytest
from packaging.version import Version

from tutelx.tuning.files import files_in, read
from tutelx.tuning.store import FOLDER, shipped_root
from tutelx.tuning.union import identity

ROOT = Path(__file__).parents[2] / FOLDER
FILES = files_in(ROOT)


def test_it_is_the_repositorys():
    assert shipped_root().resolve() == ROOT.resolve()


def test_nothing_else_lies_there():
    others = [path for path in ROOT.rglob("*") if path.is_file() and path not in FILES and path.name != "README.md"]
    assert [path for path in others if not path.name.endswith(".lock")] == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_records(path):
    contents = read(path)
    assert contents.problems == ()
    assert contents.records
    assert max(Counter(identity(record) for record in contents.records).values()) == 1
    for record in contents.records:
        assert datetime.fromisoformat(record.provenance["date"].replace("Z", "+00:00")).tzinfo is not None
        assert record.provenance["command"].startswith("tutelx ")
        assert {"tutelx", "torch"} <= record.software.keys()
        for name in ("tutelx", "torch"):
            Version(record.software[name])
        assert record.by_plan[record.default].status == "ok"
        assert len(record.candidates) > 1
        checked = [candidate for candidate in record.candidates if candidate.status == "ok"]
        assert all(candidate.error is not None for candidate in checked)
