"""The command itself: version, usage, exit codes, and that it starts fast."""

import subprocess
import sys

import pytest

import tutelx
from tutelx import cli
from tutelx.errors import InvalidValueError


def in_a_process(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60)


def test_python_m_tutelx_prints_the_version():
    done = in_a_process("-m", "tutelx", "--version")
    assert (done.returncode, done.stdout) == (0, f"tutelx {tutelx.__version__}\n")


def test_the_parser_needs_no_heavy_import():
    done = in_a_process(
        "-c", "import sys, tutelx.cli as c; c._parser(); print({'torch', 'matplotlib', 'rich'} & set(sys.modules))"
    )
    assert done.stdout == "set()\n", done.stderr


@pytest.mark.parametrize(("given", "policy"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_waiting_threads_sleep_unless_the_user_says_otherwise(given, policy):
    before = "" if given is None else f"os.environ['OMP_WAIT_POLICY'] = {given!r}; "
    done = in_a_process(
        "-c",
        f"import os; os.environ.pop('OMP_WAIT_POLICY', None); {before}from tutelx.cli import main;"
        " main(['demo', '--text', 'no such file']); print(os.environ['OMP_WAIT_POLICY'])",
    )
    assert done.stdout.split()[-1] == policy, done.stderr


@pytest.mark.parametrize("argv", [[], ["bake"], ["demo", "--flour", "1"], ["demo", "--dtype", "float8"]])
def test_what_is_unknown_prints_the_usage(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    assert "usage: tutelx" in capsys.readouterr().err


def test_every_command_is_listed_with_its_help(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for command in cli.COMMANDS:
        assert f"{command.NAME} {command.HELP}" in shown


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [(InvalidValueError("a=1 exceeds b=0"), 2, "tutelx demo: a=1 exceeds b=0\n"), (KeyboardInterrupt(), 130, "")],
)
def test_an_error_of_a_command_is_one_line_and_an_exit_code(monkeypatch, capsys, error, code, message):
    def fail(args):
        raise error

    monkeypatch.setattr(cli.demo, "run", fail)
    assert cli.main(["demo"]) == code
    assert capsys.readouterr().err == message
