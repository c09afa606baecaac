"""When a run continues in another Slurm job, and how that job is submitted; how early Slurm signals."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from launcher.errors import RequestError, RunFailed
from launcher.job import Job
from launcher.manifest import write_manifest
from launcher.records import ContinuationRecord
from launcher.run_dir import RunDir
from launcher.runs import continuation
from launcher.runs.console import RunConsole
from launcher.runs.continuation import Continuation, check_resubmit
from launcher.runs.excluded_nodes import exclude_node
from launcher.runs.interrupts import Interrupts
from launcher.slurm.continuation import (
    continues_by_itself,
    continuing,
    job_number,
    read_continuation,
    why_not_continued,
)
from launcher.slurm.options import sbatch_options
from launcher.slurm.stop_time import StopTime, describe_late_signal, needed_signal_seconds, read_stop_time
from tests.unit.inputs import job_of, machine_facts, plan_of
from tests.unit.run_directories import Built


def record(**changes: Any) -> ContinuationRecord:
    found = {"time": "t", "job": "78", "continues": "77", "number": 2, "update": 10, **changes}
    return cast(ContinuationRecord, found)


@pytest.mark.parametrize(
    ("last", "job", "begun", "saved", "reason"),
    [
        (None, "77", 0, 5, None),
        (None, "77", 0, 0, "no new checkpoint was saved since job 77 started"),
        (record(), "78", 10, 15, None),
        (record(), "78", 10, 10, "no new checkpoint was saved since job 78 started"),
        (record(), "77", 10, 15, "job 78 was submitted already to continue job 77"),
        (record(job=None), "77", 10, 15, "a job was submitted already to continue job 77"),
        (record(number=3), "78", 10, 15, "job 78 was the last of 3 in a row (slurm.max_jobs)"),
        # A user submitted job 90.
        (record(number=3), "90", 10, 15, None),
        (record(job=None, number=3), "90", 10, 15, None),
    ],
)
def test_when_a_run_is_not_continued(
    last: ContinuationRecord | None, job: str, begun: int, saved: int, reason: str | None
) -> None:
    assert why_not_continued(last, job, begun, saved, max_jobs=3) == reason


def test_a_job_that_a_user_submitted_counts_as_the_first() -> None:
    assert [job_number(last, "78") for last in (None, record(), record(job="90"), record(job=None))] == [1, 2, 1, 1]


@pytest.mark.parametrize("text", ["{", "[]", "{}", json.dumps(record(number="2")), json.dumps(record(job=5))])
def test_a_damaged_record_prevents_a_submission(tmp_path: Path, text: str) -> None:
    run = RunDir.create(tmp_path, "tiny")
    assert read_continuation(run) is None
    run.continuation_file.write_text(text)
    with pytest.raises(RunFailed, match="is damaged, so the number of jobs is unknown"):
        read_continuation(run)
    run.continuation_file.write_text(json.dumps(record()))
    assert read_continuation(run) == record()
    assert [continues_by_itself(run, job) for job in ("77", "78", "79")] == [False, True, False]


def test_the_options_of_the_next_job() -> None:
    slurm = {"array": "0-3", "array_key": "train.seed", "dependency": "singleton", "resubmit": True, "time": "60"}
    job = continuing(job_of(cluster={"nodes": 4, "gpus_per_node": 8}, slurm=slurm), "77", 3)
    options = {option.name: option.value for option in sbatch_options(job, Path("/runs"))}
    assert (options["dependency"], options["nodes"], options["time"]) == ("afterany:77", "3", "60")
    assert "array" not in options and job.slurm.array_key is None and options["output"].endswith("-slurm-%j.log")


def test_the_next_job_has_as_many_nodes_and_fewer_spare_nodes_first() -> None:
    asked = job_of(cluster={"nodes": 2, "spare_nodes": 2, "gpus_per_node": 8})
    found = [continuing(asked, "77", nodes).cluster for nodes in (4, 3, 1)]
    assert [(each.nodes, each.spare_nodes) for each in found] == [(2, 2), (2, 1), (1, 0)]


# How long a run needs to stop.


def saves(built: Built, *times: tuple[float, float]) -> None:
    for begun, ended in times:
        built.event(begun, "state", state="saving")
        built.event(ended, "checkpoint", update=1, samples=8)


def test_the_stop_time_of_a_run(tmp_path: Path) -> None:
    built = Built(tmp_path)
    assert read_stop_time(built.run) is None
    saves(built, (10, 11), (20, 420))
    # The launcher died while this one was saved.
    built.event(500, "state", state="saving")
    assert read_stop_time(built.run) == StopTime(0.0, 400.0)
    built.run.metrics_file.write_text("".join(f'{{"update": {n}, "step_seconds": {50 - n}}}\n' for n in range(30)))
    assert read_stop_time(built.run) == StopTime(40.0, 400.0)


@pytest.mark.parametrize(
    ("stop", "time", "seconds"),
    [
        (None, None, 300),
        (StopTime(10, 290), None, 300),
        (StopTime(10, 390), None, 600),
        (StopTime(10, 390), "24:00:00", 600),
        (StopTime(10, 390), "15", 450),
        (StopTime(10, 390), "8", 300),
        (StopTime(0, 1e6), None, 65535),
    ],
)
def test_the_signal_comes_early_enough_and_in_the_second_half_of_the_job(
    stop: StopTime | None, time: str | None, seconds: int
) -> None:
    slurm = job_of(slurm={"time": time} if time else {}).slurm
    assert needed_signal_seconds(slurm, stop) == seconds


def test_the_description_of_a_late_signal() -> None:
    assert describe_late_signal(job_of().slurm, StopTime(10, 390)) == (
        "the last save took 390 s and an update 10 s, but Slurm signals only 300 s before the time limit "
        "(slurm.signal_seconds)"
    )


# The submission, with an imitated Slurm.


class Slurm:
    """sbatch, squeue and scancel that record their calls. sbatch prints an id, and ends with `status`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.answers(sbatch="echo 78", squeue="echo None", scancel="true")

    def answers(self, **bodies: str) -> None:
        for name, body in bodies.items():
            script = f'#!/bin/sh\necho "{name} $*" >> {self.folder}/called\ncat > {self.folder}/{name}.in\n'
            script += f"env > {self.folder}/{name}.env\n{body}\n"
            (self.folder / name).write_text(script)
            (self.folder / name).chmod(0o755)

    def called(self, name: str) -> int:
        file = self.folder / "called"
        return sum(line.startswith(f"{name} ") for line in file.read_text().splitlines()) if file.exists() else 0

    @property
    def script(self) -> str:
        return (self.folder / "sbatch.in").read_text()


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return Slurm(tmp_path / "bin")


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run with a checkpoint of 4 updates."""
    run = RunDir.create(tmp_path / "runs", "tiny", "slurm-77")
    job = job_of(slurm={"resubmit": True, "max_jobs": 3}, cluster={"nodes": 2, "gpus_per_node": 1})
    plan = plan_of(job, machine=machine_facts(1))
    run.plan_file.write_text(plan.to_json())
    save(run, 4)
    return run


def save(run: RunDir, update: int) -> None:
    sha256 = json.loads(run.plan_file.read_text())["sha256"]
    run.checkpoint(update).mkdir()
    write_manifest(run.checkpoint(update), world_size=2, update=update, samples=8 * update, plan_sha256=sha256)


def stopped_by(*numbers: int) -> Interrupts:
    """As after these signals to a run that trains."""
    interrupts = Interrupts(RunConsole())
    ranks: Any = SimpleNamespace(stopping=False, stop_signal=0, phase="training", stop_action="stopping")

    def request_stop(number: int) -> bool:
        ranks.stopping, ranks.stop_signal = True, number
        return True

    ranks.request_stop = request_stop
    interrupts.supervisor = ranks
    for number in numbers:
        interrupts.handle(number, None)
    return interrupts


def continuation_of(run: RunDir, job: str = "77", begun: int = 0, **environment: str) -> Continuation:
    return Continuation(run, RunConsole(), job, 2, {**os.environ, **environment}, begun, 3)


def kinds(run: RunDir) -> list[str]:
    return [event["event"] for event in run.events()]


def test_the_next_job_resumes_the_run_after_this_one(run: RunDir, slurm: Slurm) -> None:
    task = {"SLURM_JOB_ID": "77", "CUDA_VISIBLE_DEVICES": "0,1", "MINE": "kept"}
    continuation_of(run, **task)(stopped_by(signal.SIGUSR1))
    for line in ("#SBATCH --dependency=afterany:77", "#SBATCH --nodes=2", f"job=(--resume {run.path})"):
        assert line in slurm.script.splitlines()
    passed = (slurm.folder / "sbatch.env").read_text()
    assert "MINE=kept" in passed and "SLURM_JOB_ID" not in passed and "CUDA_VISIBLE_DEVICES" not in passed
    written = read_continuation(run)
    assert written is not None and (written["job"], written["continues"], written["number"]) == ("78", "77", 2)
    (event,) = run.events()
    del event["time"]
    assert event == {"event": "continued", "job": "78", "continues": "77", "number": 2, "update": 4}
    # Requeued, job 77 stops again.
    save(run, 6)
    continuation_of(run, begun=4)(stopped_by(signal.SIGUSR1))
    assert slurm.called("sbatch") == 1 and kinds(run) == ["continued", "not_continued"]


def test_the_next_job_leaves_out_the_nodes_that_are_excluded_from_the_run(run: RunDir, slurm: Slurm) -> None:
    exclude_node(run, "h2", "failed 2 times")
    continuation_of(run)(stopped_by(signal.SIGUSR1))
    assert "#SBATCH --exclude=h2\n" in slurm.script


def test_a_slow_save_makes_the_next_signal_come_earlier(run: RunDir, slurm: Slurm) -> None:
    for event, time in (({"event": "state", "state": "saving"}, "00:00"), ({"event": "checkpoint"}, "08:00")):
        with run.events_file.open("a") as file:
            file.write(json.dumps({"time": f"2026-03-01T12:{time}Z", **event}) + "\n")
    continuation_of(run)(stopped_by(signal.SIGUSR1))
    assert "#SBATCH --signal=B:USR1@720" in slurm.script.splitlines()
    assert f"job=(--resume {run.path} slurm.signal_seconds=720)" in slurm.script.splitlines()


@pytest.mark.parametrize(
    ("signals", "reason", "submitted"),
    [
        ((signal.SIGUSR1, signal.SIGUSR1), "None", 1),
        ((signal.SIGUSR2,), "None", 1),
        ((signal.SIGTERM,), "None", 0),
        ((signal.SIGINT,), "None", 0),
        ((signal.SIGUSR1, signal.SIGTERM), "None", 0),
        ((signal.SIGUSR1, signal.SIGTERM), "TimeLimit", 1),
        ((signal.SIGTERM,), "TimeLimit", 1),
    ],
)
def test_only_the_time_limit_leads_to_another_job(
    run: RunDir, slurm: Slurm, signals: tuple[int, ...], reason: str, submitted: int
) -> None:
    slurm.answers(squeue=f"echo {reason}")
    continuation_of(run)(stopped_by(*signals))
    assert slurm.called("sbatch") == submitted
    assert kinds(run) == ["continued"] * submitted


def test_a_request_of_the_batch_script_leads_to_another_job_and_one_of_a_user_does_not(
    run: RunDir, slurm: Slurm
) -> None:
    run.request_stop(now=False)
    continuation_of(run)(stopped_by(signal.SIGUSR1))
    assert slurm.called("sbatch") == 0
    run.request_stop(now=False, time_limit=True)
    continuation_of(run)(stopped_by(signal.SIGUSR1))
    assert slurm.called("sbatch") == 1


def test_a_request_of_a_user_during_the_submission_cancels_the_job(run: RunDir, slurm: Slurm) -> None:
    request = json.dumps({"time": "t", "now": False, "by": "u@h"})
    slurm.answers(sbatch=f"echo '{request}' > {run.stop_file}; echo 78")
    continuation_of(run)(stopped_by(signal.SIGUSR1))
    assert "scancel -- 78" in (slurm.folder / "called").read_text()
    assert kinds(run) == []


def test_a_refused_submission_is_reported_and_not_tried_again(
    run: RunDir, slurm: Slurm, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.answers(sbatch="echo 'sbatch: error: QOSMaxSubmitJobPerUserLimit' >&2; exit 1")
    continuation_of(run)(stopped_by(signal.SIGUSR1))
    (event,) = run.events()
    assert event["event"] == "not_continued" and "QOSMaxSubmitJobPerUserLimit" in event["reason"]
    assert "no other job continues the run: Slurm rejected the job" in capsys.readouterr().out
    continuation_of(run)(stopped_by(signal.SIGUSR1))
    assert slurm.called("sbatch") == 1


def test_nothing_is_submitted_if_it_cannot_be_recorded(
    run: RunDir, slurm: Slurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(continuation, "write_json", full)
    continuation_of(run)(stopped_by(signal.SIGUSR1))
    assert slurm.called("sbatch") == 0 and kinds(run) == ["not_continued"]


def test_a_job_that_cannot_be_recorded_is_cancelled(run: RunDir, slurm: Slurm) -> None:
    slurm.answers(sbatch=f"rm {run.continuation_file}; mkdir {run.continuation_file}; echo 78")
    continuation_of(run)(stopped_by(signal.SIGUSR1))
    assert "scancel -- 78" in (slurm.folder / "called").read_text()
    assert kinds(run) == ["not_continued"]


@pytest.mark.usefixtures("slurm")
def test_a_job_whose_continuation_could_not_be_submitted_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def asking(**sections: Any) -> Job:
        return job_of(slurm={"resubmit": True}, **sections)

    check_resubmit(asking(cluster={"gpus_per_node": 0}))
    with pytest.raises(RequestError, match="auto, but Slurm gives a job only the GPUs that it requests"):
        check_resubmit(asking())
    monkeypatch.setenv("PATH", "/nowhere")
    check_resubmit(job_of())
    with pytest.raises(RequestError, match=r"slurm\.resubmit: sbatch is not installed on this node"):
        check_resubmit(asking(cluster={"gpus_per_node": 0}))
