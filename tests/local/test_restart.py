"""A failed run starts again by itself, and ends as if it had not failed."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from launcher.run_dir import RunDir
from tests.local.launcher_commands import RAYS_OWN_AGENTS, Command, run_folder, updates_made, write_job
from tests.local.rank_runs import merged
from tests.unit.inputs import command

pytestmark = pytest.mark.local


def a_job(job_dict: dict, **sections) -> dict:
    """A job that saves every second of its 60 updates: enough for two kills before its end."""
    return merged(
        job_dict, train={"max_steps": 60, "restarts": 3}, checkpoint={"every": 2, "keep": 2}, export=False, **sections
    )


def losses(run: RunDir) -> list[tuple[int, float, float]]:
    return [(line["update"], line["loss"], line["lr"]) for line in run.metrics()]


def test_a_killed_rank_and_a_killed_agent_restart_the_run_which_ends_as_an_uninterrupted_one(
    job_dict: dict, tmp_path: Path, forked: dict[str, str]
) -> None:
    (tmp_path / "plain").mkdir()
    plain = Command("run", str(write_job(tmp_path / "plain", a_job(job_dict))), folder=tmp_path / "plain", **forked)
    assert plain.wait() == 0, plain.output

    (tmp_path / "killed").mkdir()
    folder = tmp_path / "killed"
    running = Command("run", str(write_job(folder, a_job(job_dict))), folder=folder, **forked)
    running.wait_for(lambda: updates_made(folder) >= 3)
    running.ranks()[1].kill()
    running.wait_for(lambda: "restarting" in running.output and updates_made(folder) >= 6)
    running.agent().kill()
    assert running.wait() == 0, running.output
    assert running.left_behind(*RAYS_OWN_AGENTS) == []

    run, expected = RunDir(run_folder(folder)), RunDir(run_folder(tmp_path / "plain"))
    assert losses(run) == losses(expected)
    restarts = [event for event in run.events() if event["event"] == "restart"]
    assert [event["attempt"] for event in restarts] == [2, 3]
    assert all(event["update"] % 2 == 0 for event in restarts)
    assert "signal SIGKILL" in restarts[0]["reason"]
    logs = sorted(path.name for path in run.logs.glob("node-*/rank-1*.log"))
    assert logs == ["rank-1.attempt-2.log", "rank-1.attempt-3.log", "rank-1.log"]
    assert command("why", str(run.path)).out.startswith("no failure: the run finished after 60 updates")
    assert signal.Signals(9).name in running.output
