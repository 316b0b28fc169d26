"""Imports go down the floors only, and `import tutelx` does no work."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "tutelx"

# Rooms from the ground up; rooms on one floor never import each other.
FLOORS = [
    {"errors", "machine"},
    {"types", "env", "draws", "hooks"},
    {"ops"},
    {"comm"},
    {"gates", "experts", "stats", "planner", "stopwatch", "testing"},
    {"tuning"},
    {"scheduler", "policies"},
    {"dispatch", "choices", "brief"},
    {"base"},
    {"layer"},
    {"wrapping", "integrations"},
    {"structure", "losses", "parallel", "checkpoints", "monitor"},
    {"demo", "bench"},
    {"tuner"},
    {"cli", "__main__"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# One subject each, in two files on purpose: `wrapping` is the face, `integrations` the recognisers behind it.
SAME_FLOOR_ALLOWED = {("wrapping", "integrations"), ("__main__", "cli")}


def rooms_imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "tutelx":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("tutelx.")}
    return found


def test_imports_go_down():
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        assert room in FLOOR, f"{room} has no floor: add it to FLOORS"
        for other in rooms_imported(path) & FLOOR.keys() - {room}:
            if FLOOR[other] >= FLOOR[room] and (room, other) not in SAME_FLOOR_ALLOWED:
                wrong.append(
                    f"{path.relative_to(PACKAGE)} (floor {FLOOR[room]}) imports {other} (floor {FLOOR[other]})"
                )
    assert not wrong, "\n".join(wrong)


def test_the_reference_imports_no_kernel():
    assert rooms_imported(PACKAGE / "ops" / "reference.py") == set()


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_import_does_no_work():
    heavy = "('tutelx', 'torch', 'numpy', 'matplotlib', 'rich')"
    code = f"import sys, tutelx; print(sorted(m for m in sys.modules if m.startswith({heavy})))"
    assert run(code).strip() == "['tutelx']"


def test_public_names():
    code = "import tutelx; print([n for n in tutelx.__all__ if not hasattr(tutelx, n)], tutelx.wrap.__name__)"
    assert run(code).strip() == "[] wrap"
    # The function stays the function whichever module was imported first.
    assert run("import tutelx.wrapping, tutelx; print(callable(tutelx.wrap))").strip() == "True"


def test_unknown_name():
    code = "import tutelx\ntry: tutelx.nothing\nexcept AttributeError as e: print(e)"
    assert "has no attribute 'nothing'" in run(code)


def test_files_stay_small():
    limits = {".py": 300, ".cpp": 400, ".h": 400, ".cu": 600, ".cuh": 600}
    roots = [PACKAGE, PACKAGE.parent / "csrc"]
    long = {
        str(p.relative_to(PACKAGE.parent)): lines
        for root in roots
        for p in root.rglob("*")
        if p.suffix in limits and (lines := len(p.read_text().splitlines())) > limits[p.suffix]
    }
    assert not long, f"these files have outgrown their subject: {long}"
