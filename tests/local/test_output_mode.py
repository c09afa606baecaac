"""Who can read a run directory: nobody else by default, or the group with `output_mode: group`. Needs root."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import gettempdir

import pytest

from launcher.run_dir import RunDir
from tests.local.launcher_commands import Command, run_folder, write_job
from tests.local.rank_runs import merged
from tests.local.test_detach import wait_for_end
from tests.local.test_hang import stopped_rank
from tests.unit.inputs import command

pytestmark = [pytest.mark.local, pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become other users")]

MEMBER, STRANGER, GROUP, OTHER_GROUP = 61_001, 61_002, 62_001, 62_002
LOCKS = """
import fcntl, sys
from pathlib import Path
for path in [Path(sys.argv[1]), *Path(sys.argv[1]).rglob("*")]:
    try:
        file = path.open("rb")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        print(path.name)
    except OSError:
        pass
"""


@pytest.fixture
def _open_umask() -> Iterator[None]:
    """A shell in which everything that a program creates is writable by everybody."""
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that other users can enter, with a folder for runs that belongs to a group, with the setgid bit."""
    # pytest's folders are private; pytest-xdist has one more of them.
    for each in (tmp_path, *tmp_path.parents):
        if each.is_relative_to(gettempdir()) and each != Path(gettempdir()):
            each.chmod(0o755)
    runs = tmp_path / "runs"
    runs.mkdir()
    os.chown(runs, 0, GROUP)
    runs.chmod(0o2775)
    return tmp_path


def as_user(user: int, group: int, *argv: str) -> subprocess.CompletedProcess[str]:
    become = ["setpriv", "--reuid", str(user), "--regid", str(group), "--clear-groups"]
    return subprocess.run([*become, *argv], capture_output=True, text=True, timeout=60)


def ran(job: dict, folder: Path, mode: str | None, shared_ray: dict[str, str]) -> RunDir:
    """A finished run, and a further export of it, with a checkpoint, an evaluation and a spike guard's files."""
    changes = {"output_dir": str(folder / "runs"), **({"output_mode": mode} if mode else {})}
    file = write_job(
        folder,
        {
            **merged(
                job,
                train={"max_steps": 3, "eval_every": 2},
                checkpoint={"every": 2},
                data={"cache_dir": str(folder / "cache")},
            ),
            **changes,
        },
    )
    done = Command("run", str(file), folder=folder, **shared_ray)
    assert done.wait() == 0, done.output
    run = RunDir(run_folder(folder))
    exported = Command("export", str(run.path), "--update", "2", folder=folder, **shared_ray)
    assert exported.wait() == 0, exported.output
    return run


def modes(path: Path) -> dict[str, int]:
    return {str(each.relative_to(path)): stat.S_IMODE(each.lstat().st_mode) for each in (path, *path.rglob("*"))}


def wrong_for_the_group(path: Path) -> dict[str, str]:
    """The modes of all files and folders that are not those of `output_mode: group` in a folder with the setgid bit."""
    return {
        name: oct(mode)
        for name, mode in modes(path).items()
        if mode & ~0o100 != (0o2650 if (path / name).is_dir() else 0o640)
    }


@pytest.mark.usefixtures("_open_umask")
def test_only_the_owner_can_read_whatever_the_umask(job_dict, folder, shared_ray):
    run = ran(job_dict, folder, None, shared_ray)
    found = modes(run.path)
    assert len(found) > 20 and {name: oct(mode) for name, mode in found.items() if mode & 0o077} == {}
    assert {name for name, mode in modes(folder / "cache").items() if mode & 0o077} == set()
    for group in (GROUP, OTHER_GROUP):
        assert as_user(MEMBER, group, "ls", str(run.path)).returncode != 0


@pytest.mark.usefixtures("_open_umask")
def test_the_group_can_read_everything_and_change_nothing(job_dict, folder, shared_ray):
    run = ran(job_dict, folder, "group", shared_ray)
    found = modes(run.path)
    assert len(found) > 20 and wrong_for_the_group(run.path) == {"launcher.lock": "0o600"}
    assert {each.lstat().st_gid for each in (run.path, *run.path.rglob("*"))} == {GROUP}
    read = as_user(
        MEMBER, GROUP, "sh", "-c", 'find "$0" -type f ! -name launcher.lock -exec cat {} + | wc -c', str(run.path)
    )
    assert read.returncode == 0 and read.stderr == "" and int(read.stdout) > 10_000
    written = as_user(MEMBER, GROUP, "find", str(run.path), "-writable", "!", "-type", "l")
    assert written.stdout == ""
    assert as_user(STRANGER, OTHER_GROUP, "ls", str(run.path)).returncode != 0
    assert {name for name, mode in modes(folder / "cache").items() if mode & 0o077} == set()


@pytest.mark.usefixtures("_open_umask")
def test_the_group_can_read_a_run_in_the_background(job_dict, folder, shared_ray):
    changes = {"output_dir": str(folder / "runs"), "output_mode": "group"}
    file = write_job(folder, {**merged(job_dict, data={"cache_dir": str(folder / "cache")}), **changes})
    planned = Command("run", str(file), "--detach", folder=folder, **shared_ray)
    assert planned.wait() == 0, planned.output
    run = RunDir(run_folder(folder))
    wait_for_end(int(planned.output.partition("in the background, process ")[2].split()[0]))
    assert run.state()["state"] == "finished", run.console_file.read_text()
    assert wrong_for_the_group(run.path) == {"launcher.lock": "0o600"}


def test_a_member_of_the_group_cannot_lock_the_run(job_dict, folder, shared_ray):
    """A lock on any file that is open to the group must not stop the owner from resuming the run."""
    run = ran(job_dict, folder, "group", shared_ray)
    locked = as_user(MEMBER, GROUP, sys.executable, "-c", LOCKS, str(run.path))
    assert "state.json" in locked.stdout.split() and "launcher.lock" not in locked.stdout.split()
    shown = command("status", str(run.path))
    assert shown.status == 0 and "finished" in shown.out


@pytest.mark.usefixtures("_open_umask")
def test_the_group_can_read_what_a_hang_and_a_second_attempt_leave(job_dict, folder, shared_ray):
    job = {**merged(job_dict, data={"cache_dir": str(folder / "cache")}), "output_mode": "group"}
    running = stopped_rank(job, folder, shared_ray, restarts=1, max_steps=100)
    assert running.wait() == 0, running.output
    path = run_folder(folder)
    names = {Path(name).name for name in modes(path)}
    assert {"attempt.json", "stacks.txt", "rank-1.log", "rank-1.attempt-2.log"} <= names
    assert wrong_for_the_group(path) == {"launcher.lock": "0o600"}
