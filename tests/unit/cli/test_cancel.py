"""Stopping a run from elsewhere: who takes the request, who may ask, and what Slurm still holds."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launcher.cli import cancel
from launcher.cli import run as run_verb
from launcher.cli.console import RunConsole
from launcher.cli.run import interruptible
from launcher.watch import status
from tests.time_limit import TIME_LIMIT_SECONDS
from tests.unit.inputs import as_nobody, command, write_folder
from tests.unit.run_directories import START, Built


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Built:
    for name in ("_HEARD_SECONDS", "_NOW_SECONDS"):
        monkeypatch.setattr(cancel, name, 0.3)
    monkeypatch.setattr(cancel, "_LOOK_SECONDS", 0.02)
    return Built(tmp_path / "runs")


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """squeue and scancel that write down how they were called; squeue prints what `state` holds."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("squeue", "scancel"):
        script = f"#!/bin/sh\necho {name} $@ >> {folder}/called\ntest {name} = scancel || cat {folder}/state\n"
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


@contextmanager
def after(condition: Callable[[], bool], built: Built, state: str) -> Iterator[None]:
    """The launcher at work takes the request once the condition holds, and the run comes to an end."""

    def take() -> None:
        deadline = time.monotonic() + TIME_LIMIT_SECONDS
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.02)
        built.run.event("stop_requested", now=False, by="u@h")
        built.run.enter(state, reason="cancelled by u@h")

    thread = threading.Thread(target=take)
    thread.start()
    yield
    thread.join()


def printed() -> str:
    """What the command that runs in this process has printed so far."""
    return sys.stdout.getvalue() if isinstance(sys.stdout, io.StringIO) else ""


@pytest.mark.parametrize(("state", "held", "cancelled"), [("stopped", "PENDING", 1), ("stopped", "RUNNING", 0)])
def test_a_job_that_slurm_queued_again_is_cancelled(
    built: Built, slurm: Path, state: str, held: str, cancelled: int
) -> None:
    built.state(state, 5.0, slurm_job_id="77")
    (slurm / "state").write_text(held + "\n")
    ended = command("cancel", str(built.run.path))
    assert (ended.status, ended.err) == (0, "")
    calls = (slurm / "called").read_text().splitlines()
    assert calls == ["squeue --noheader --jobs 77 --format %T", "scancel -- 77"][: 1 + cancelled]
    again = "but Slurm had queued its job 77 again: cancelled that"
    assert (again in ended.out) == bool(cancelled)
    assert "stopped" in ended.out


def test_a_run_that_has_ended_is_told_so(built: Built, slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built.state("finished", 5.0, slurm_job_id="77")
    assert command("cancel", str(built.run.path)).out.endswith("has ended already: finished\n")
    assert not (slurm / "called").exists()
    monkeypatch.setenv("PATH", "/nowhere")
    built.state("failed", 5.0, slurm_job_id="77")
    assert command("cancel", str(built.run.path)).out.endswith("has ended already: failed\n")


def test_a_request_that_is_taken_late_is_waited_for(built: Built) -> None:
    built.state("placing", time.time() - START)
    with built.run.held(), after(lambda: "it stands: waiting" in printed(), built, "stopped"):
        ended = command("cancel", str(built.run.path))
    assert (ended.status, ended.err) == (0, "")
    assert ended.out.splitlines() == [
        "nobody has taken the request yet (state placing); it stands: waiting",
        "tiny-20260301-120000 was told to save and stop",
        "stopped: cancelled by u@h; updates made: 0",
    ]


def test_without_waiting_and_where_nobody_is_left_it_gives_up(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    built.state("training", time.time() - START)
    ended = command("cancel", str(built.run.path), "--no-wait")
    assert ended.status == 1 and "nobody took the request: state training, process 4711 on h0" in ended.err
    monkeypatch.setattr(status, "LOST_SECONDS", 1.0)
    ended = command("cancel", str(built.run.path))
    assert ended.status == 1
    assert "no launcher holds it, so it ended without a word\n  go on with launcher resume" in ended.err


def test_at_once_does_not_wait_for_a_run_that_does_not_answer(built: Built, slurm: Path) -> None:
    built.state("training", time.time() - START, slurm_job_id="77")
    with built.run.held():
        ended = command("cancel", str(built.run.path), "--now")
    assert (ended.status, ended.err) == (0, "")
    assert (slurm / "called").read_text() == "scancel -- 77\n"
    assert built.run.state()["reason"] == "Slurm job 77 was cancelled"


def test_damaged_lines_of_events_do_not_keep_a_run_from_being_stopped(built: Built) -> None:
    built.state("training", time.time() - START)
    with built.run.events_file.open("a") as file:
        file.write('{"time": "2026-03\n[1]\n')
    built.run.metrics_file.write_text('{"update": 0}\n{"upd\n{"update": 1}\n')
    with built.run.held(), after(built.run.stop_file.exists, built, "stopped"):
        ended = command("cancel", str(built.run.path))
    assert (ended.status, ended.err) == (0, "")
    assert ended.out.endswith("updates made: 2\n")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become nobody to try this")
def test_one_who_may_not_write_is_told_so(built: Built, tmp_path: Path) -> None:
    built.state("training", time.time() - START)
    built.run.path.chmod(0o755)
    ended = as_nobody(tmp_path, "cancel", str(built.run.path))
    assert ended.status == 2
    assert "you may not stop this run, which is root's: Permission denied" in ended.err


def test_one_that_listens_hears_a_request_made_before(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    """While nodes come up there is no supervisor, and the run ends at once; who listens next hears nothing twice."""
    monkeypatch.setattr(run_verb, "_REQUEST_SECONDS", 0.05)
    built.run.request_stop(now=False)
    with pytest.raises(run_verb.typer.Exit) as ended, interruptible(RunConsole(), built.run):
        time.sleep(30)
    assert ended.value.exit_code == 143
    assert [event["event"] for event in built.run.events()][-1] == "stop_requested"


def test_a_run_is_cancelled_while_its_nodes_come_up(tmp_path: Path) -> None:
    """The first of two nodes, of which the other never comes: it waits for ten minutes."""
    write_folder(tmp_path)
    task = {"SLURM_JOB_ID": "77", "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "h[0-1]", "SLURM_CPUS_PER_TASK": "4"}
    launcher = str(Path(sys.executable).with_name("launcher"))
    with subprocess.Popen(
        [launcher, "node", "job.yaml"],
        cwd=tmp_path,
        env={**os.environ, **task},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as first:
        path = tmp_path / "runs/job-slurm-77"
        while not (path / "state.json").exists():
            assert first.poll() is None, first.communicate()
            time.sleep(0.05)
        ended = command("cancel", str(path))
        output, _ = first.communicate(timeout=TIME_LIMIT_SECONDS)
    assert (ended.status, ended.err) == (0, "")
    assert "stopped: cancelled by" in ended.out
    assert first.returncode == 143 and "cancelled by" in output and "Traceback" not in output
    state = json.loads((path / "state.json").read_text())
    assert state["state"] == "stopped" and state["reason"].startswith("cancelled by ")
