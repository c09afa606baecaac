"""A run that hangs is noticed, the rank that differs is named, and the run restarts or fails."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest

from launcher.run_dir import RunDir
from tests.local.launcher_commands import RAYS_OWN_AGENTS, Command, run_folder, updates_made, write_job
from tests.local.rank_runs import merged
from tests.unit.inputs import command

pytestmark = pytest.mark.local

SCRIPT = """
import os, time
import launcher

def loops_forever():
    while True:
        pass

def waits_for_peers():
    time.sleep(1000)

for step in range(1000):
    if step == 20:
        loops_forever() if os.environ["RANK"] == "1" else waits_for_peers()
    launcher.report(step=step, loss=1.0, lr=1e-3)
    time.sleep(0.05)
"""


def stopped_rank(job_dict: dict, folder: Path, shared_ray: dict[str, str], **train: object) -> Command:
    """A run whose second rank is stopped in the middle of training."""
    # Without checkpoints: a save has half an hour.
    job = merged(job_dict, train={"max_steps": 100_000, "hang_seconds": 3, **train})
    running = Command("run", str(write_job(folder, {**job, "export": False})), folder=folder, **shared_ray)
    running.wait_for(lambda: updates_made(folder) >= 6)
    running.ranks()[1].send_signal(signal.SIGSTOP)
    return running


def test_a_stopped_rank_is_named_and_ended(job_dict: dict, tmp_path: Path, shared_ray: dict[str, str]) -> None:
    running = stopped_rank(job_dict, tmp_path, shared_ray)
    assert running.wait() == 1, running.output
    assert running.left_behind(*RAYS_OWN_AGENTS) == []
    run = RunDir(run_folder(tmp_path))
    assert (run.state()["state"], run.state()["code"]) == ("failed", "hung")
    assert "rank 1 on node 0" in str(run.state()["message"])
    why = command("why", str(run.path)).out
    for text in (running.output, why):
        assert "the run hung: no progress for" in text
        assert "rank 1 on node 0" in text and "its process is stopped (SIGSTOP)" in text
    (stacks,) = run.logs.glob("node-*/stacks.txt")
    assert f"the stacks of the ranks: {stacks}" in why
    # The other rank waits in a collective, in whichever the stop came.
    assert re.search(r"rank 0, process(.|\n)*(all_reduce|all_gather|reduce_scatter|barrier)", stacks.read_text())


def test_a_stopped_rank_does_not_end_a_run_with_restarts(
    job_dict: dict, tmp_path: Path, shared_ray: dict[str, str]
) -> None:
    running = stopped_rank(job_dict, tmp_path, shared_ray, restarts=1)
    run = RunDir(run_folder(tmp_path))
    running.wait_for(lambda: "restarting" in running.output)
    made = updates_made(tmp_path)
    running.wait_for(lambda: updates_made(tmp_path) > made + 3)
    running.interrupt()
    assert running.wait() == 130, running.output
    (restart,) = [event for event in run.events() if event["event"] == "restart"]
    assert "rank 1 on node 0" in restart["reason"] and restart["update"] is None
    assert [line["update"] for line in run.metrics()] == list(range(len(run.metrics())))
    assert running.left_behind(*RAYS_OWN_AGENTS) == []


def test_a_run_that_hung_once_restarts_and_makes_all_its_updates(
    job_dict: dict, tmp_path: Path, shared_ray: dict[str, str]
) -> None:
    # Long enough that the rank is stopped in the middle, whatever the machine is doing.
    running = stopped_rank(job_dict, tmp_path, shared_ray, restarts=3, max_steps=100)
    assert running.wait() == 0, running.output
    run = RunDir(run_folder(tmp_path))
    (restart,) = [event for event in run.events() if event["event"] == "restart"]
    assert "rank 1 on node 0" in restart["reason"]
    assert [line["update"] for line in run.metrics()] == list(range(100))
    assert command("why", str(run.path)).out.startswith("no failure: the run finished after 100 updates")
    assert running.left_behind(*RAYS_OWN_AGENTS) == []


def test_a_script_that_loops_is_named(tmp_path: Path, shared_ray: dict[str, str]) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    job = {
        "name": "loops",
        "train": {"max_steps": 1000, "hang_seconds": 4, "train_micro_batch_size_per_gpu": 1},
        "schedule": {"peak_lr": 1e-3},
        "cluster": {"processes_per_node": 2, "gpus_per_node": 0},
    }
    (tmp_path / "job.yaml").write_text(json.dumps(job))
    running = Command("exec", "job.yaml", "--", "train.py", folder=tmp_path, **shared_ray)
    assert running.wait() == 1, running.output
    assert "the run hung: no progress for" in running.output
    assert "rank 0 on node 0" in running.output and "in waits_for_peers (train.py:" in running.output
    assert "in loops_forever (train.py:" in running.output
    assert running.left_behind(*RAYS_OWN_AGENTS) == []
