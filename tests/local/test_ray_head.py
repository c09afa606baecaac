"""Ray's head process ends during a run: the run fails and reports that reason."""

from __future__ import annotations

import contextlib

import psutil
import pytest

from launcher.run_dir import RunDir
from tests.local.launcher_commands import (
    RAY_PROCESS,
    RAYS_OWN_AGENTS,
    Command,
    existing_ray,
    run_folder,
    updates_made,
    write_job,
)
from tests.local.rank_runs import merged
from tests.unit.inputs import command

pytestmark = pytest.mark.local


def name_of(process: psutil.Process) -> str | None:
    """None if the process has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.name()
    return None


def test_a_run_whose_ray_head_is_killed_fails_and_names_ray(job_dict, tmp_path, forked):
    job = merged(job_dict, train={"max_steps": 100_000, "restarts": 0}, cluster={"processes_per_node": 1})
    running = Command("run", str(write_job(tmp_path, job)), folder=tmp_path, **forked)
    running.wait_for(lambda: updates_made(tmp_path) >= 2)
    (head,) = [child for child in psutil.Process(running.process.pid).children() if name_of(child) == "gcs_server"]
    head.kill()
    assert running.wait() == 1, running.output
    run = RunDir(run_folder(tmp_path))
    assert (run.state()["state"], run.state()["code"]) == ("failed", "ray_lost")
    why = command("why", str(run.path)).out
    assert why.startswith("the run failed while training: Ray's head process (gcs_server) at ")
    assert "likely cause: Ray could not be reached, or its head process ended\n" in why
    assert "Ray's head process (gcs_server) at " in running.output and "Traceback" not in running.output
    assert running.left_behind(*RAYS_OWN_AGENTS) == []


def test_a_run_on_a_joined_ray_whose_head_is_killed_fails_and_is_not_restarted(started, forked):
    sooner = "import launcher.fleet.ray_head as h; h.JOINED_SECONDS = 6.0"
    with existing_ray(cpus=2, **forked) as variables:
        running = started("training", variables, sooner)
        ray = psutil.Process(int(variables[RAY_PROCESS]))
        (head,) = [child for child in ray.children() if name_of(child) == "gcs_server"]
        head.kill()
        assert running.wait() == 1, running.output
        run = RunDir(run_folder(running.folder))
        assert (run.state()["state"], run.state()["code"], run.attempt()) == ("failed", "ray_lost", 1)
        assert "not restarting: the launcher did not start this Ray" in running.output
        assert "Traceback" not in running.output
    assert running.left_behind(*RAYS_OWN_AGENTS) == []
