"""A run whose time limit is too short continues in the next Slurm job, until it is finished or may not continue."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from launcher.run_dir import RunDir
from tests.cluster.hosts import CPU_ONLY, Hosts
from tests.cluster.slurm import Slurm
from tests.cluster.test_slurm import launcher, of_launcher, wait_for
from tests.cluster.tiny_jobs import BIN, runs_of, write_tiny_job

pytestmark = pytest.mark.cluster

UPDATES = 100


def submit(hosts: Hosts, job_file: Path, *overrides: str) -> str:
    """Submits a job with `launcher submit`; returns the Slurm job's id."""
    command = [str(BIN / "launcher"), "submit", job_file.name, "--parsable", *overrides]
    environment = {**CPU_ONLY, **hosts.start_fork_servers()}
    return hosts.run("ctl", command, cwd=job_file.parent, **environment).stdout.strip()


def jobs_of(run: RunDir) -> list[str]:
    """The Slurm jobs that the run's events name as continuing it."""
    return [event["job"] for event in run.events() if event["event"] == "continued"]


def state_of(hosts: Hosts, job: str) -> str:
    found = re.search(r"JobState=(\S+)", hosts.run("ctl", ["scontrol", "show", "job", job]).stdout)
    assert found
    return found[1]


def logs_of(shared: Path) -> Callable[[], str]:
    return lambda: "\n".join(f"== {log.name}\n{log.read_text()}" for log in sorted((shared / "runs").glob("*.log")))


def signal(hosts: Hosts, job: str) -> None:
    """What Slurm sends before the time limit, to the batch script alone."""
    hosts.run("ctl", ["scancel", "--batch", "--signal=USR1", job])


def write_long_job(shared: Path, **slurm: object) -> Path:
    """A job of 100,000 updates on one node that asks for continuations."""
    sections = {"slurm": {"resubmit": True, **slurm}, "cluster": {"nodes": 1}, "train": {"max_steps": 100_000}}
    return write_tiny_job(shared, "long", **sections)


def end_soon(hosts: Hosts, job: str) -> None:
    """Sets the time limit of a running job to the end of the next minute."""
    shown = hosts.run("ctl", ["scontrol", "show", "job", job]).stdout
    elapsed = re.search(r"RunTime=(\d+):(\d+):(\d+)", shown)
    assert elapsed
    minutes = 60 * int(elapsed[1]) + int(elapsed[2]) + 2
    hosts.run("ctl", ["scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}"])


def test_a_run_finishes_over_three_jobs_with_the_losses_of_one(slurm: Slurm, shared: Path) -> None:
    hosts, told = slurm.hosts, logs_of(shared)
    sections = {"train": {"max_steps": UPDATES}, "cluster": {"nodes": 1}, "export": False}
    whole = submit(hosts, write_tiny_job(shared, "whole", slurm={"time": "60"}, **sections))
    wait_for(lambda: state_of(hosts, whole) == "COMPLETED", told)
    slow = shared / "slow"
    slow.mkdir()
    (slow / "sitecustomize.py").write_text(_SLOW)
    (slow / "now").touch()
    slurm_keys = {"time": "60", "signal_seconds": 60, "resubmit": True}
    job_file = write_tiny_job(shared, "short", slurm=slurm_keys, **sections)
    jobs = [submit(hosts, job_file, f"cluster.env.PYTHONPATH={slow}")]
    run = RunDir(shared / "runs" / f"short-slurm-{jobs[0]}")
    for number in (1, 2):
        made = len(run.metrics())
        wait_for(lambda made=made: len(run.metrics()) >= made + 5, told)
        end_soon(hosts, jobs[-1])
        wait_for(lambda number=number: len(jobs_of(run)) == number, told)
        jobs.append(jobs_of(run)[-1])
        assert f"Slurm job {jobs[-1]} continues the run (job {number + 1} of at most 10)" in told()
        assert run.complete_checkpoints()[-1] == len(run.metrics())
    wait_for(lambda: run.state()["slurm_job_id"] == jobs[2], told)
    (slow / "now").unlink()
    wait_for(lambda: run.state().get("state") == "finished", told)
    assert len(jobs_of(run)) == 2 and run.state()["slurm_job_id"] == jobs[2]
    assert [line["update"] for line in run.metrics()] == list(range(UPDATES))
    assert [line["samples"] for line in run.metrics()] == [12 * (update + 1) for update in range(UPDATES)]
    (run_whole,) = runs_of(shared, "whole")
    for key in ("loss", "lr"):
        assert [line[key] for line in run.metrics()] == [line[key] for line in run_whole.metrics()]
    steps = np.diff([line["lr"] for line in run.metrics()[UPDATES // 4 :]])
    np.testing.assert_allclose(steps, steps[0], rtol=1e-6)
    wait_for(lambda: state_of(hosts, jobs[2]) == "COMPLETED", told)
    assert of_launcher(hosts) == []


def test_a_continuation_is_shown_counted_and_cancelled(slurm: Slurm, shared: Path) -> None:
    hosts, told = slurm.hosts, logs_of(shared)
    first = submit(hosts, write_long_job(shared, max_jobs=2))
    run = RunDir(shared / "runs" / f"long-slurm-{first}")
    wait_for(lambda: len(run.metrics()) >= 2, told)
    # The next job must not start before the test has looked at it.
    for host in hosts.names:
        hosts.run("ctl", ["scontrol", "update", f"NodeName={host}", "State=DRAIN", "Reason=test"])
    signal(hosts, first)
    wait_for(lambda: jobs_of(run) != [], told)
    (second,) = jobs_of(run)
    made = len(run.metrics())
    assert run.complete_checkpoints() == [made]
    assert json.loads(launcher(hosts, "status", str(run.path), "--json"))["continued_by"] == second
    assert f"Slurm job {second} was submitted to continue it" in launcher(hosts, "why", str(run.path))
    shown = hosts.run("ctl", ["scontrol", "show", "job", second]).stdout
    assert "NumNodes=1" in shown and state_of(hosts, second) == "PENDING"
    answer = launcher(hosts, "cancel", str(run.path))
    assert f"cancelled its Slurm job {second}, which was submitted to continue it" in answer
    wait_for(lambda: state_of(hosts, second) == "CANCELLED", told)
    for host in hosts.names:
        hosts.run("ctl", ["scontrol", "update", f"NodeName={host}", "State=RESUME"])

    # A user's own continuation counts as a first job again; the job after it is the last of two.
    third = hosts.run(
        "ctl", [str(BIN / "launcher"), "submit", "--resume", str(run.path), "--parsable"], cwd=shared, **CPU_ONLY
    ).stdout.strip()
    wait_for(lambda: len(run.metrics()) >= made + 2, told)
    signal(hosts, third)
    wait_for(lambda: len(jobs_of(run)) == 2, told)
    fourth = jobs_of(run)[-1]
    made = len(run.metrics())
    wait_for(lambda: len(run.metrics()) >= made + 2, told)
    signal(hosts, fourth)
    wait_for(lambda: state_of(hosts, fourth) == "FAILED", told)
    assert len(jobs_of(run)) == 2
    reason = f"job {fourth} was the last of 2 in a row (slurm.max_jobs)"
    assert reason in launcher(hosts, "why", str(run.path)) and reason in " ".join(told().split())
    assert [line["update"] for line in run.metrics()] == list(range(len(run.metrics())))


def test_no_job_continues_a_run_that_a_user_ended_or_that_made_no_update(slurm: Slurm, shared: Path) -> None:
    hosts, told = slurm.hosts, logs_of(shared)
    job_file = write_long_job(shared)
    cancelled, ended, early = (submit(hosts, job_file) for _ in range(3))
    runs = [RunDir(shared / "runs" / f"long-slurm-{job}") for job in (cancelled, ended, early)]
    # While the nodes of the run start.
    wait_for(lambda: runs[2].state().get("state") == "placing", told)
    signal(hosts, early)
    wait_for(lambda: all(len(run.metrics()) >= 2 for run in runs[:2]), told)
    launcher(hosts, "cancel", str(runs[0].path))
    signal(hosts, ended)
    # After Slurm's warning, as a user may do it.
    hosts.run("ctl", ["scancel", ended])
    wait_for(lambda: all(run.state().get("state") == "stopped" for run in runs), told)
    for job in (cancelled, ended, early):
        wait_for(lambda job=job: state_of(hosts, job) in ("FAILED", "CANCELLED"), told)
    time.sleep(1)
    assert [jobs_of(run) for run in runs] == [[], [], []], told()
    assert hosts.run("ctl", ["squeue", "--noheader"]).stdout == ""
    assert runs[0].complete_checkpoints() == [len(runs[0].metrics())]


_SLOW = """
import os
if "RANK" in os.environ:
    import time
    from pathlib import Path
    from launcher.worker import train

    advance = train.TrainLoop.advance

    def slowly(self, *arguments):
        advance(self, *arguments)
        if Path(__file__).with_name("now").exists():
            time.sleep(2)

    train.TrainLoop.advance = slowly
"""
