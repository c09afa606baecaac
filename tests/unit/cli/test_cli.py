"""The command line as a whole: exit statuses, `python -m launcher`, a closed pipe, and private files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import launcher
from tests.unit.inputs import command, write_folder


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (("--version",), 0, launcher.__version__),
        (("--help",), 0, "Usage"),
        ((), 2, "Usage"),
        (("trian",), 2, "No such command 'trian'"),
        (("run",), 2, "Missing argument"),
        (("plan", "job.yaml", "--jsn"), 2, "--json"),
        (("resume", "nowhere"), 2, "was not found"),
    ],
)
def test_exit_statuses(arguments: tuple[str, ...], status: int, says: str) -> None:
    ended = command(*arguments)
    assert ended.status == status
    assert says in ended.out + ended.err


def test_launcher_runs_as_a_module(folder: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "launcher", "--version"], cwd=folder, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"launcher {launcher.__version__}\n", "")
    wrong = subprocess.run([sys.executable, "-m", "launcher", "resume", "nowhere"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "was not found" in wrong.stderr and "Traceback" not in wrong.stderr


def test_a_closed_output_pipe_is_not_an_error() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "launcher", "schema"], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.stderr == ""


@pytest.mark.parametrize(("name", "private"), [("run", True), ("export", True), ("schema", False), ("init", False)])
def test_files_of_a_run_are_private(name: str, private: bool) -> None:
    """In a separate process, since the umask belongs to the process."""
    code = (
        "import os, sys\nfrom launcher import cli\nsys.argv = ['launcher', sys.argv[1], 'nowhere']\n"
        "os.umask(0o022)\n"
        "try: cli.main()\nexcept SystemExit: pass\nprint(oct(os.umask(0)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, name], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == ("0o77" if private else "0o22")
