"""Only one launcher works in a run directory, also without working file locks; a reader cannot lock a launcher out."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launcher import lock
from launcher.errors import RequestError
from launcher.lock import STALE_SECONDS, heartbeat_age, hold, read_holder
from launcher.run_dir import RunDir
from launcher.runs.run_lock import only_launcher_of

HOLDING = """
import sys
from pathlib import Path
from launcher.lock import hold
with hold(Path(sys.argv[1])) as held:
    print(held, flush=True)
    sys.stdin.read()
"""


@contextmanager
def another_launcher(path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock file."""
    command = [sys.executable, "-c", HOLDING, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "True\n"
        yield process
        process.stdin.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "launcher.lock"


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that grants every lock, like Lustre on different hosts."""
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)


def write_lock(path: Path, age_seconds: float, **changes: object) -> None:
    """Writes a lock file that its launcher last touched `age_seconds` ago."""
    path.unlink(missing_ok=True)
    with hold(path) as held:
        assert held
        holder = json.loads(path.read_text())
    path.write_text(json.dumps({**holder, **changes}))
    os.utime(path, (time.time() - age_seconds,) * 2)


def is_free(path: Path) -> bool:
    with hold(path) as held:
        return held


def test_only_one_process_holds_the_lock(path: Path) -> None:
    with another_launcher(path) as other:
        assert not is_free(path)
        holder = read_holder(path)
        assert holder is not None and (holder.pid, holder.host) == (other.pid, socket.gethostname())
    assert read_holder(path) is None
    assert is_free(path)


@pytest.mark.usefixtures("no_locks")
def test_a_process_on_this_host_is_detected_without_file_locks(path: Path) -> None:
    with another_launcher(path) as other:
        os.utime(path, (0, 0))  # an old heartbeat does not matter
        assert not is_free(path)
        other.send_signal(signal.SIGKILL)
        other.wait()
        assert read_holder(path) is not None
        assert is_free(path)


@pytest.mark.usefixtures("no_locks")
def test_another_process_with_the_same_pid_is_not_the_holder(path: Path) -> None:
    write_lock(path, 0.0, pid=os.getpid(), started=1)
    assert is_free(path)


@pytest.mark.parametrize(
    ("age", "changes", "expected"),
    [
        (1.0, {"host": "other"}, False),
        (STALE_SECONDS - 20, {"host": "other"}, False),
        (STALE_SECONDS + 1, {"host": "other"}, True),
        # Another host with the same name, or the same host after a reboot.
        (1.0, {"boot": "another"}, False),
        (STALE_SECONDS + 1, {"boot": "another"}, True),
        # A record with invalid values is not a holder.
        (1.0, {"host": 7}, True),
        (1.0, {"pid": "7"}, True),
    ],
)
def test_a_launcher_on_another_host_is_checked_by_its_heartbeat(
    path: Path, age: float, changes: dict, expected: bool
) -> None:
    write_lock(path, age, **changes)
    assert is_free(path) is expected


def test_a_requeued_slurm_job_does_not_wait_for_its_previous_start(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    write_lock(path, 1.0, host="other", slurm_job="7", slurm_restart="0")
    assert is_free(path)
    for same_start in ({"slurm_restart": "1"}, {"slurm_job": "8"}):
        write_lock(path, 1.0, **{"host": "other", "slurm_job": "7", "slurm_restart": "0", **same_start})
        assert not is_free(path)


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00" * 9])
def test_an_empty_or_damaged_lock_file_does_not_lock(path: Path, content: str) -> None:
    path.write_text(content)
    assert is_free(path)


def test_the_holder_touches_the_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.05)
    with hold(path):
        os.utime(path, (0, 0))
        deadline = time.monotonic() + 60
        while path.stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        age = heartbeat_age(path)
        assert age is not None and age < 60
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_checking_the_lock_does_not_keep_a_launcher_out(path: Path) -> None:
    """`launcher status` takes a shared lock for a moment."""
    path.touch()
    looking = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import fcntl, sys, time; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_SH); print(flush=True); "
            "time.sleep(0.3)",
            str(path),
        ],
        stdout=subprocess.PIPE,
    )
    assert looking.stdout is not None
    looking.stdout.readline()
    assert is_free(path)
    looking.wait()


def test_the_holder_is_detected_on_a_file_system_without_locks(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refused)
    with hold(path) as first, hold(path) as second:
        assert (first, second) == (True, False)


def test_a_stale_claim_from_a_crash_is_replaced(path: Path) -> None:
    claim = path.with_name(f".{path.name}.claim")
    claim.touch()
    assert not is_free(path)
    os.utime(claim, (0, 0))
    assert is_free(path)
    assert not claim.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user to try this")
@pytest.mark.parametrize("before", [None, 0o644])
def test_a_user_with_read_permission_cannot_lock_it(tmp_path: Path, before: int | None) -> None:
    """With any mode of the folder, and also with a readable lock file of an earlier version."""
    run = RunDir.create(tmp_path, "job")
    closed = {path: path.stat().st_mode for path in (run.path, *run.path.parents) if path.stat().st_mode & 0o5 != 0o5}
    for folder in closed:
        folder.chmod(0o755)
    if before is not None:
        run.lock_file.touch(mode=before)
    with run.held():
        pass
    assert stat.S_IMODE(run.lock_file.stat().st_mode) == 0o600
    locking = (
        "import fcntl, os, sys\nos.setuid(65534)\nos.stat(sys.argv[1])\nf = open(sys.argv[1])\n"
        "fcntl.flock(f, fcntl.LOCK_SH)"
    )
    done = subprocess.run([sys.executable, "-c", locking, str(run.lock_file)], capture_output=True, text=True)
    for folder, mode in closed.items():
        folder.chmod(mode)
    # stat works, open does not.
    assert "PermissionError" in done.stderr and "line 4" in done.stderr
    with run.held() as held:
        assert held


def test_the_holder_of_a_run_is_named(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path, "job")
    run.enter("training")
    write_lock(run.lock_file, 1.0, host="node7", pid=4711)
    with pytest.raises(RequestError) as refused, only_launcher_of(run):
        pass
    (problem,) = refused.value.problems
    assert "another launcher is running this run: state training, process 4711 on node7, since 20" in problem.message
    assert problem.hint is not None and "if that host is down, the lock expires 60 s after" in problem.hint
