"""Faults at every moment of a run: the run restarts by itself, and ends as one without a fault."""

from __future__ import annotations

import psutil
import pytest

from launcher.run_dir import RunDir
from tests.local import launcher_commands
from tests.local.fault_runs import Start, check_results
from tests.local.launcher_commands import RAYS_OWN_AGENTS, Command, run_folder
from tests.unit.inputs import command

pytestmark = pytest.mark.local

MOMENTS = ("starting", "training", "evaluating", "saving", "exporting")


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("victim", ["rank 0", "rank 1", "agent"])
def test_a_killed_process_of_a_node(
    victim: str, moment: str, without_fault: dict[str, object], started: Start, shared_ray: dict[str, str]
) -> None:
    running = started(moment, shared_ray)
    killed = running.agent() if victim == "agent" else running.ranks()[int(victim[-1])]
    killed.kill()
    # The export of a run that has made all updates needs no second start of the ranks.
    check_results(running, without_fault, attempts=1 if moment == "exporting" else 2)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_launcher_leaves_nothing_and_a_resume_continues(
    moment: str, without_fault: dict[str, object], started: Start, shared_ray: dict[str, str]
) -> None:
    running = started(moment, shared_ray)
    running.look()
    running.process.kill()
    running.process.wait()
    assert running.left_behind(*RAYS_OWN_AGENTS, seconds=15) == []
    run = run_folder(running.folder)
    if not RunDir(run).complete_checkpoints():
        return
    resumed = Command("resume", str(run), folder=running.folder, **shared_ray)
    check_results(resumed, without_fault, attempts=1 if moment == "exporting" else 2)


def test_a_killed_raylet_is_replaced(without_fault: dict[str, object], started: Start, forked: dict[str, str]) -> None:
    running = started("training", forked)
    (raylet,) = [child for child in psutil.Process(running.process.pid).children() if child.name() == "raylet"]
    raylet.kill()
    check_results(running, without_fault, attempts=2)


def test_a_killed_head_of_our_own_ray_is_replaced(
    without_fault: dict[str, object], started: Start, forked: dict[str, str]
) -> None:
    running = started("training", forked)
    (head,) = [child for child in psutil.Process(running.process.pid).children() if child.name() == "gcs_server"]
    head.kill()
    check_results(running, without_fault, attempts=2)
    assert "restarting (1 of at most 3 restarts" in running.output


def test_a_loss_that_is_nan_stops_the_run_without_a_restart(
    started: Start, shared_ray: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = launcher_commands.launcher_with
    monkeypatch.setattr(launcher_commands, "launcher_with", lambda _, setup: plain("faulty_worker", setup))
    running = started("none", shared_ray, cluster={"env": {"LAUNCHER_FAULT": "loss_is_nan:5"}})
    assert running.wait() == 1, running.output
    run = RunDir(run_folder(running.folder))
    assert (run.state()["state"], run.state()["code"], run.attempt()) == ("stopped", "nan_loss", 1)
    assert run.complete_checkpoints() == [4, 5]
    for text in (running.output, command("why", str(run.path)).out):
        assert "the loss of update 5 is nan; the weights are those before this update" in text
    assert "Traceback" not in running.output
    assert running.left_behind(*RAYS_OWN_AGENTS) == []
