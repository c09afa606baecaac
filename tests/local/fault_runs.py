"""Runs with faults: their job, what they must end with, and runs whose ranks wait at a moment for their fault."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from launcher.run_dir import RunDir
from tests.local.launcher_commands import RAYS_OWN_AGENTS, Command, run_folder
from tests.local.rank_runs import merged

UPDATES = 8
Start = Callable[..., Command]


def faulty_job(job_dict: dict, moment: str = "none", **sections: object) -> dict:
    """A job that saves every second of its updates, and evaluates after six and eight."""
    job = merged(
        job_dict,
        train={"max_steps": UPDATES, "restarts": 3, "eval_every": 6},
        checkpoint={"every": 2, "keep": 2},
        cluster={"env": {"LAUNCHER_WAIT_AT": moment}},
    )
    return merged(job, **sections)


def results(run: RunDir) -> dict[str, object]:
    """What must not depend on faults: losses, learning rates, evaluations, checkpoints and the exported weights."""
    weights = (run.export / "model.safetensors").read_bytes()
    return {
        "metrics": [(line["update"], line["samples"], line["loss"], line["lr"]) for line in run.metrics()],
        "evaluations": [(line["update"], line["loss"]) for line in run.evaluations()],
        "checkpoints": run.complete_checkpoints(),
        "weights": hashlib.sha256(weights).hexdigest(),
    }


def check_results(running: Command, without_fault: dict[str, object], *, attempts: int) -> None:
    """The run ends as the one without a fault, after this many attempts, and leaves no process."""
    assert running.wait() == 0, running.output
    run = RunDir(run_folder(running.folder))
    assert results(run) == without_fault
    assert run.state()["state"] == "finished"
    assert run.attempt() == attempts, running.output
    assert "Traceback" not in running.output
    assert running.left_behind(*RAYS_OWN_AGENTS) == []


def waiting_ranks(running: Command) -> int:
    """How many ranks wait for the fault."""
    return len(list(running.folder.glob("runs/*/waits-*")))


def let_continue(running: Command) -> None:
    """Lets the waiting ranks continue."""
    (run_folder(running.folder) / "continue").touch()
