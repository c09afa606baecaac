"""The clock is set forward and back by an hour during a run: nothing is lost or hangs, and no time is negative."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import pytest

from launcher.run_dir import RunDir
from launcher.watch.status import read_status
from tests.local.launcher_commands import RAYS_OWN_AGENTS, Command, run_folder, updates_made
from tests.needs import need

pytestmark = pytest.mark.local

SCRIPT = """
import time
import launcher

for step in range(100_000):
    launcher.report(step=step, loss=1.0, lr=1e-3)
    time.sleep(0.05)
"""
JOB = {
    "name": "clocks",
    "train": {"max_steps": 100_000, "hang_seconds": 20, "train_micro_batch_size_per_gpu": 1},
    "schedule": {"peak_lr": 1e-3},
    "cluster": {"processes_per_node": 2, "gpus_per_node": 0},
}
HOUR = 3600
_LIBRARY = next(iter(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")), None)


class Clock:
    """The clock of processes that were started with its variables."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.variables = {
            "LD_PRELOAD": str(_LIBRARY),
            "FAKETIME_TIMESTAMP_FILE": str(file),
            "FAKETIME_NO_CACHE": "1",
            "DONT_FAKE_MONOTONIC": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "NO_FAKE_STAT": "1",
        }
        self.set_to(0)

    def set_to(self, ahead_seconds: int) -> None:
        """Sets the clock to so many seconds ahead of this machine's."""
        new = self._file.with_name("new")
        new.write_text(f"{ahead_seconds:+d}\n")
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
    need(None if _LIBRARY else "faketime is not installed")
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "job.yaml").write_text(json.dumps(JOB))
    clock = Clock(tmp_path / "clock")
    running = Command("exec", "job.yaml", "--", "train.py", folder=tmp_path, **clock.variables)
    running.wait_for(lambda: updates_made(tmp_path) >= 20)
    run = RunDir(run_folder(tmp_path))
    nodes = []
    for ahead in (HOUR, -HOUR, 0):
        clock.set_to(ahead)
        made = updates_made(tmp_path)
        # Several reports of the agent, which are 5 seconds apart.
        running.wait_for(lambda made=made: updates_made(tmp_path) > made + 150)
        status = read_status(run, time.time() + clock.ahead)
        assert status.state == "training" and negative(dataclasses.asdict(status)) == []
        nodes += status.nodes
    assert [node.ranks_alive for node in nodes] == [2, 2, 2] and not any(node.stale for node in nodes)
    running.interrupt()
    assert running.wait() == 130, running.output
    assert (run.state()["state"], run.attempt()) == ("stopped", 1)
    for text in ("restarting", "has not answered", "hung", "Traceback"):
        assert text not in running.output
    assert negative(run.metrics()) == [] and negative(run.events()) == []
    assert running.left_behind(*RAYS_OWN_AGENTS) == []
