"""The clock is set forward and back by an hour during a run: nothing is lost or hangs, and no time is negative."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import pytest

from launcher.run_dir import RunDir
from launcher.watch.run_session import seconds_of
from launcher.watch.status import read_status
from tests.local.launcher_commands import RAYS_OWN_AGENTS, Command, run_folder, updates_made

pytestmark = pytest.mark.local

SCRIPT = """
import time
import launcher

for step in range(100_000):
    launcher.report(step=step, loss=1.0, lr=1e-3)
    time.sleep(0.02)
"""
JOB = {
    "name": "clocks",
    "train": {"max_steps": 100_000, "hang_seconds": 20, "train_micro_batch_size_per_gpu": 1},
    "schedule": {"peak_lr": 1e-3},
    "cluster": {"processes_per_node": 2, "gpus_per_node": 0},
}
HOUR = 3600
STEPPED_CLOCK = str(Path(__file__).parents[1] / "stepped_clock")


class Clock:
    """The clock of the Python processes that are started with its variables."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.variables = {"PYTHONPATH": STEPPED_CLOCK, "CLOCK_FILE": str(file)}
        self.set_to(0)

    def set_to(self, ahead_seconds: int) -> None:
        """Sets the clock to so many seconds ahead of this machine's."""
        new = self._file.with_name("new")
        new.write_text(str(ahead_seconds))
        new.replace(self._file)
        self.ahead = ahead_seconds


def negative(values: object) -> list[object]:
    """The negative numbers in nested values."""
    if isinstance(values, dict):
        return [found for value in values.values() for found in negative(value)]
    if isinstance(values, list | tuple):
        return [found for value in values for found in negative(value)]
    return [values] if isinstance(values, int | float) and values < 0 else []


def test_a_clock_that_is_set_forward_and_back(tmp_path: Path) -> None:
    """The launcher, its Ray, its agent and the ranks of a script are on one machine with that clock."""
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "job.yaml").write_text(json.dumps(JOB))
    clock = Clock(tmp_path / "clock")
    running = Command("exec", "job.yaml", "--", "train.py", folder=tmp_path, **clock.variables)
    running.wait_for(lambda: updates_made(tmp_path) >= 20)
    run = RunDir(run_folder(tmp_path))
    (written,) = run.logs.glob("node-*/node.json")
    for ahead in (HOUR, -HOUR):
        clock.set_to(ahead)
        before = written.read_text()
        running.wait_for(lambda before=before: written.read_text() != before)
        status = read_status(run, time.time() + clock.ahead)
        assert status.state == "training" and negative(dataclasses.asdict(status)) == []
        (node,) = status.nodes
        assert (node.ranks_alive, node.stale) == (2, False)
        # The agent has that clock too.
        assert abs(seconds_of(json.loads(written.read_text())["time"]) - time.time() - ahead) < HOUR / 2
    running.interrupt()
    assert running.wait() == 130, running.output
    assert (run.state()["state"], run.attempt()) == ("stopped", 1)
    for text in ("restarting", "has not answered", "hung", "Traceback"):
        assert text not in running.output
    assert negative(run.metrics()) == [] and negative(run.events()) == []
    assert running.left_behind(*RAYS_OWN_AGENTS) == []
