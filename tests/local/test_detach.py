"""`launcher run --detach` and `launcher resume --detach`: planned in the foreground, carried out without a terminal."""

from __future__ import annotations

import os
import pty
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from launcher.run_dir import ENDED, RunDir
from tests.local.launcher_commands import LAUNCHER, RAY_PROCESS, run_folder, updates_made, write_job
from tests.local.rank_runs import merged
from tests.time_limit import TIME_LIMIT_SECONDS

pytestmark = pytest.mark.local


def in_a_terminal(*arguments: str, folder: Path, environment: dict[str, str]) -> tuple[int, str]:
    """The exit status and output of a launcher command in a terminal that is closed at its end."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [*LAUNCHER, *arguments],
        cwd=folder,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env={**os.environ, **{name: value for name, value in environment.items() if name != RAY_PROCESS}},
        start_new_session=True,
        preexec_fn=lambda: os.close(os.open(os.ttyname(slave), os.O_RDWR)),
    )
    os.close(slave)
    output = b""
    try:
        while part := os.read(master, 4096):
            output += part
    except OSError:
        # The last process that had the terminal open has ended.
        pass
    os.close(master)
    return process.wait(TIME_LIMIT_SECONDS), output.decode()


def wait_for_state(run: RunDir, *states: str) -> None:
    deadline = time.monotonic() + TIME_LIMIT_SECONDS
    while run.state().get("state") not in states:
        assert time.monotonic() < deadline, run.console_file.read_text()
        time.sleep(0.1)


def wait_for_end(pid: int) -> None:
    _, alive = psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], TIME_LIMIT_SECONDS)
    assert alive == []


def test_a_run_continues_without_its_terminal_and_is_resumed(job_dict, tmp_path, shared_ray):
    job = write_job(tmp_path, merged(job_dict, train={"max_steps": 100_000}, export=False))
    status, output = in_a_terminal("run", str(job), "--detach", folder=tmp_path, environment=shared_ray)
    assert status == 0, output
    run = RunDir(run_folder(tmp_path))
    for shown in (run.path, run.console_file, f"launcher logs --follow {run.path}", f"launcher cancel {run.path}"):
        assert str(shown) in output
    pid = run.holder().pid
    assert f"process {pid}" in output and psutil.Process(pid).terminal() is None
    wait_for_state(run, "training")

    status, refused = in_a_terminal("resume", str(run.path), "--detach", folder=tmp_path, environment=shared_ray)
    assert status == 2 and "another launcher is running this run" in refused

    status, cancelled = in_a_terminal("cancel", str(run.path), folder=tmp_path, environment=shared_ray)
    assert status == 0, cancelled
    wait_for_end(pid)
    made = updates_made(tmp_path)
    assert run.complete_checkpoints() == [made]
    assert f"after update {made} of 100000, saved" in run.console_file.read_text()

    words = (f"train.max_steps={made + 3}", "schedule.nowhere=1")
    status, refused = in_a_terminal(
        "resume", str(run.path), *words, "--detach", folder=tmp_path, environment=shared_ray
    )
    assert status == 2 and "schedule.nowhere" in refused
    status, output = in_a_terminal(
        "resume", str(run.path), words[0], "--detach", folder=tmp_path, environment=shared_ray
    )
    assert status == 0, output
    wait_for_state(run, *ENDED)
    assert run.state()["state"] == "finished", run.console_file.read_text()
    assert [line["update"] for line in run.metrics()] == list(range(made + 3))
    assert f"finished after {made + 3} updates" in run.console_file.read_text()


def test_errors_of_planning_come_in_the_foreground(job_dict, tmp_path, forked):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "one"}\n{"text": \n')
    job = write_job(tmp_path, job_dict)
    for word, shown in ((f"data.train={broken}", "broken.jsonl:2"), ("train.max_steps=-1", "train.max_steps")):
        status, output = in_a_terminal("run", str(job), word, "--detach", folder=tmp_path, environment=forked)
        assert status == 2, output
        assert shown in output and "Traceback" not in output and "background" not in output
    assert not (tmp_path / "runs").exists() or list((tmp_path / "runs").iterdir()) == []
