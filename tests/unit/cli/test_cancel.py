"""`launcher cancel`: receipt of the request, permissions, and requeued Slurm jobs."""

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

from launcher.run_dir import write_json
from launcher.runs import cancel, interrupts
from launcher.runs.console import RunConsole
from launcher.watch import status
from tests.time_limit import TIME_LIMIT_SECONDS
from tests.unit.inputs import as_nobody, command, write_folder
from tests.unit.run_directories import START, Built


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Built:
    for name in ("_RECEIPT_SECONDS", "_RECEIPT_NOW_SECONDS"):
        monkeypatch.setattr(cancel, name, 0.3)
    monkeypatch.setattr(cancel, "_POLL_SECONDS", 0.02)
    return Built(tmp_path / "runs")


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Fake squeue and scancel that record their calls; squeue prints the content of `state`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("squeue", "scancel"):
        script = f"#!/bin/sh\necho {name} $@ >> {folder}/called\ntest {name} = scancel || cat {folder}/state\n"
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


@contextmanager
def stopped_after(condition: Callable[[], bool], built: Built, state: str) -> Iterator[None]:
    """Receives the request once the condition is true, and ends the run in `state`, as a launcher would."""

    def receive() -> None:
        deadline = time.monotonic() + TIME_LIMIT_SECONDS
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.02)
        built.run.event({"event": "stop_requested", "now": False, "by": "u@h"})
        built.run.enter(state, reason="cancelled by u@h")

    thread = threading.Thread(target=receive)
    thread.start()
    yield
    thread.join()


def printed() -> str:
    """What the command in this process has printed so far."""
    return sys.stdout.getvalue() if isinstance(sys.stdout, io.StringIO) else ""


@pytest.mark.parametrize(("state", "held", "cancelled"), [("stopped", "PENDING", 1), ("stopped", "RUNNING", 0)])
def test_a_requeued_slurm_job_is_cancelled(built: Built, slurm: Path, state: str, held: str, cancelled: int) -> None:
    built.state(state, 5.0, slurm_job_id="77")
    (slurm / "state").write_text(held + "\n")
    ended = command("cancel", str(built.run.path))
    assert (ended.status, ended.err) == (0, "")
    calls = (slurm / "called").read_text().splitlines()
    assert calls == ["squeue --noheader --jobs 77 --format %T", "scancel -- 77"][: 1 + cancelled]
    requeued = "cancelled its Slurm job 77, which was requeued"
    assert (requeued in ended.out) == bool(cancelled)
    assert "stopped" in ended.out


@pytest.mark.parametrize(
    ("continues", "held", "cancelled"), [("77", "PENDING", 1), ("77", "", 0), ("76", "PENDING", 0)]
)
def test_the_job_that_continues_a_run_is_cancelled(
    built: Built, slurm: Path, continues: str, held: str, cancelled: int
) -> None:
    built.state("stopped", 5.0, slurm_job_id="77")
    write_json(built.run.continuation_file, {"job": "78", "continues": continues, "number": 2, "update": 5})
    # Only the job that continues the run is in the queue.
    (slurm / "squeue").write_text(
        f"#!/bin/sh\necho squeue $@ >> {slurm}/called\ncase $* in *' 78 '*) echo {held};; esac\n"
    )
    ended = command("cancel", str(built.run.path))
    assert (ended.status, ended.err) == (0, "")
    assert ("scancel -- 78" in (slurm / "called").read_text()) == bool(cancelled)
    assert ("cancelled its Slurm job 78, which was submitted to continue it" in ended.out) == bool(cancelled)
    # A launcher that is about to submit the next job reads it.
    request = built.run.stop_request()
    assert request is not None and "time_limit" not in request


def test_a_run_that_has_already_ended_is_reported(built: Built, slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built.state("finished", 5.0, slurm_job_id="77")
    assert command("cancel", str(built.run.path)).out.endswith("has already ended: finished\n")
    assert not (slurm / "called").exists()
    monkeypatch.setenv("PATH", "/nowhere")
    built.state("failed", 5.0, slurm_job_id="77")
    assert command("cancel", str(built.run.path)).out.endswith("has already ended: failed\n")


def test_cancel_waits_for_a_late_receipt(built: Built) -> None:
    built.state("placing", time.time() - START)
    with built.run.held(), stopped_after(lambda: "); waiting" in printed(), built, "stopped"):
        ended = command("cancel", str(built.run.path))
    assert (ended.status, ended.err) == (0, "")
    assert ended.out.splitlines() == [
        "the launcher has not received the request yet (state placing); waiting",
        "tiny-20260301-120000: stop requested, after saving",
        "stopped: cancelled by u@h; updates made: 0",
    ]


def test_cancel_fails_with_no_wait_or_if_the_launcher_has_died(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    built.state("training", time.time() - START)
    ended = command("cancel", str(built.run.path), "--no-wait")
    assert ended.status == 1 and "no launcher received the request: state training, process 4711 on h0" in ended.err
    monkeypatch.setattr(status, "LOST_SECONDS", 1.0)
    ended = command("cancel", str(built.run.path))
    assert ended.status == 1
    assert "no launcher holds its lock, so its launcher has died\n  resume the run with launcher resume" in ended.err


def test_cancel_now_cancels_the_slurm_job_of_a_run_that_does_not_respond(built: Built, slurm: Path) -> None:
    built.state("training", time.time() - START, slurm_job_id="77")
    with built.run.held():
        ended = command("cancel", str(built.run.path), "--now")
    assert (ended.status, ended.err) == (0, "")
    assert (slurm / "called").read_text() == "scancel -- 77\n"
    assert built.run.state()["reason"] == "Slurm job 77 was cancelled"


def test_a_run_with_damaged_event_lines_can_be_cancelled(built: Built) -> None:
    built.state("training", time.time() - START)
    with built.run.events_file.open("a") as file:
        file.write('{"time": "2026-03\n[1]\n')
    built.run.metrics_file.write_text('{"update": 0}\n{"upd\n{"update": 1}\n')
    with built.run.held(), stopped_after(built.run.stop_file.exists, built, "stopped"):
        ended = command("cancel", str(built.run.path))
    assert (ended.status, ended.err) == (0, "")
    assert ended.out.endswith("updates made: 2\n")


def test_a_request_because_of_the_time_limit_is_a_warning(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before training it stops the run at once, as Slurm's SIGUSR1 does."""
    monkeypatch.setattr(interrupts, "_POLL_SECONDS", 0.05)
    built.run.request_stop(now=False, time_limit=True)
    with pytest.raises(interrupts.Interrupted) as ended, interrupts.interruptible(RunConsole(), built.run) as handled:
        time.sleep(30)
    assert (ended.value.exit_status, handled.reason) == (138, "the time limit of its Slurm job is near")
    assert not handled.asked


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to switch to the user nobody")
def test_a_user_without_write_permission_cannot_cancel(built: Built, tmp_path: Path) -> None:
    built.state("training", time.time() - START)
    built.run.path.chmod(0o755)
    ended = as_nobody(tmp_path, "cancel", str(built.run.path))
    assert ended.status == 2
    assert "you do not have permission to stop this run of root: Permission denied" in ended.err


def test_an_earlier_request_is_received_and_stops_the_run(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the nodes start there is no supervisor, and the run stops at once."""
    monkeypatch.setattr(interrupts, "_POLL_SECONDS", 0.05)
    built.run.request_stop(now=False)
    with pytest.raises(interrupts.Interrupted) as ended, interrupts.interruptible(RunConsole(), built.run):
        time.sleep(30)
    assert ended.value.exit_status == 143
    assert [event["event"] for event in built.run.events()][-1] == "stop_requested"


def test_a_run_can_be_cancelled_while_its_nodes_start(tmp_path: Path) -> None:
    """The first of two nodes waits ten minutes for the other, which never starts."""
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
