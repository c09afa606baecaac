"""Faults at every moment of a run: the run restarts by itself, and ends as one without a fault."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from launcher.run_dir import RunDir
from tests.local import launcher_commands
from tests.local.launcher_commands import RAYS_OWN_AGENTS, Command, run_folder, write_job
from tests.local.rank_runs import merged

pytestmark = pytest.mark.local

MOMENTS = ("starting", "training", "evaluating", "saving", "exporting")
UPDATES = 8
Start = Callable[[str, dict[str, str]], Command]


def job(job_dict: dict, moment: str = "none") -> dict:
    """A job that saves every second of its updates, and evaluates after six and eight."""
    return merged(
        job_dict,
        train={"max_steps": UPDATES, "restarts": 3, "eval_every": 6},
        checkpoint={"every": 2, "keep": 2},
        cluster={"env": {"LAUNCHER_WAIT_AT": moment}},
    )


def results(run: RunDir) -> dict[str, object]:
    """What must not depend on faults: losses, learning rates, evaluations, checkpoints and the exported weights."""
    weights = (run.export / "model.safetensors").read_bytes()
    return {
        "metrics": [(line["update"], line["samples"], line["loss"], line["lr"]) for line in run.metrics()],
        "evaluations": [(line["update"], line["loss"]) for line in run.evaluations()],
        "checkpoints": run.complete_checkpoints(),
        "weights": hashlib.sha256(weights).hexdigest(),
    }


@pytest.fixture(scope="module")
def expected() -> dict[str, object]:
    """The results of the run without a fault, once it was made."""
    return {}


@pytest.fixture
def without_fault(job_dict: dict, tmp_path: Path, shared_ray: dict[str, str], expected: dict) -> dict[str, object]:
    if not expected:
        (tmp_path / "plain").mkdir()
        file = write_job(tmp_path / "plain", job(job_dict))
        command = Command("run", str(file), folder=tmp_path / "plain", **shared_ray)
        assert command.wait() == 0, command.output
        expected.update(results(RunDir(run_folder(tmp_path / "plain"))))
    return expected


@pytest.fixture
def started(job_dict: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Starts a run, both of whose ranks wait at a moment; returns once they do."""

    def start(moment: str, environment: dict[str, str]) -> Command:
        folder = tmp_path / "faulty"
        folder.mkdir()
        monkeypatch.setattr(launcher_commands, "LAUNCHER", launcher_commands.launcher_with("waiting_worker"))
        running = Command("run", str(write_job(folder, job(job_dict, moment))), folder=folder, **environment)
        running.wait_for(lambda: len(list(folder.glob("runs/*/waits-*"))) == 2)
        return running

    return start


def check(running: Command, without_fault: dict[str, object], *, attempts: int) -> None:
    """The run ends as the one without a fault, after this many attempts, and leaves no process."""
    assert running.wait() == 0, running.output
    run = RunDir(run_folder(running.folder))
    assert results(run) == without_fault
    assert run.state()["state"] == "finished"
    assert run.attempt() == attempts, running.output
    assert "Traceback" not in running.output
    assert running.left_behind(*RAYS_OWN_AGENTS) == []


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("victim", ["rank 0", "rank 1", "agent"])
def test_a_killed_process_of_a_node(
    victim: str, moment: str, without_fault: dict[str, object], started: Start, shared_ray: dict[str, str]
) -> None:
    running = started(moment, shared_ray)
    killed = running.agent() if victim == "agent" else running.ranks()[int(victim[-1])]
    killed.kill()
    # The export of a run that has made all updates needs no second start of the ranks.
    check(running, without_fault, attempts=1 if moment == "exporting" else 2)


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
    check(resumed, without_fault, attempts=1 if moment == "exporting" else 2)


def test_a_killed_raylet_is_replaced(without_fault: dict[str, object], started: Start, forked: dict[str, str]) -> None:
    running = started("training", forked)
    (raylet,) = [child for child in psutil.Process(running.process.pid).children() if child.name() == "raylet"]
    raylet.kill()
    check(running, without_fault, attempts=2)
