"""Ranks that hang while they load, and saves that take longer than the time between updates may."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.run_dir import RunDir
from tests.local import launcher_commands
from tests.local.launcher_commands import RAYS_OWN_AGENTS, Command, run_folder, updates_made, write_job
from tests.local.rank_runs import merged
from tests.unit.inputs import command

pytestmark = pytest.mark.local

HANG_SECONDS = 3
SAVES_AT_THE_END = f"""
import signal, time
import launcher

def save(*_):
    time.sleep({3 * HANG_SECONDS})
    raise SystemExit(0)

signal.signal(signal.SIGTERM, save)
for step in range(100_000):
    launcher.report(step=step, loss=1.0, lr=1e-3)
    time.sleep(0.05)
"""


@pytest.fixture
def faulty(job_dict, tmp_path, shared_ray, monkeypatch):
    """Starts a run of six updates whose ranks have a fault; returns the command."""

    def start(fault: str, long_seconds: float = 1800.0) -> Command:
        limit = f"import launcher.fleet.hang_detector as h; h.LONG_SECONDS = {long_seconds}"
        monkeypatch.setattr(launcher_commands, "LAUNCHER", launcher_commands.launcher_with("faulty_worker", limit))
        train = {"max_steps": 6, "hang_seconds": HANG_SECONDS}
        job = merged(job_dict, train=train, checkpoint={"every": 3}, cluster={"env": {"LAUNCHER_FAULT": fault}})
        return Command("run", str(write_job(tmp_path, {**job, "export": False})), folder=tmp_path, **shared_ray)

    return start


def test_a_slow_save_is_not_a_hang(faulty, tmp_path: Path) -> None:
    running = faulty(f"saves_slowly:{2 * HANG_SECONDS}")
    assert running.wait() == 0, running.output
    run = RunDir(run_folder(tmp_path))
    assert run.state()["state"] == "finished"
    assert run.complete_checkpoints() == [3, 6]


def test_a_script_that_saves_after_a_stop_request_is_not_ended(tmp_path: Path, shared_ray: dict[str, str]) -> None:
    (tmp_path / "train.py").write_text(SAVES_AT_THE_END)
    job = {
        "name": "saves",
        "train": {"max_steps": 100_000, "hang_seconds": HANG_SECONDS, "train_micro_batch_size_per_gpu": 1},
        "schedule": {"peak_lr": 1e-3},
        "cluster": {"processes_per_node": 2, "gpus_per_node": 0},
    }
    (tmp_path / "job.yaml").write_text(json.dumps(job))
    running = Command("exec", "job.yaml", "--", "train.py", folder=tmp_path, **shared_ray)
    running.wait_for(lambda: updates_made(tmp_path) >= 5)
    running.interrupt()
    assert running.wait() == 130, running.output
    assert RunDir(run_folder(tmp_path)).state()["state"] == "stopped"
    assert running.left_behind(*RAYS_OWN_AGENTS) == []


def test_a_rank_that_hangs_while_loading_is_named_and_ended(faulty, tmp_path: Path) -> None:
    running = faulty("loads_forever:1", long_seconds=20.0)
    assert running.wait() == 1, running.output
    assert running.left_behind(*RAYS_OWN_AGENTS) == []
    run = RunDir(run_folder(tmp_path))
    assert (run.state()["state"], run.state()["code"]) == ("failed", "hung")
    why = command("why", str(run.path)).out
    for text in (running.output, why):
        assert "while loading, after 0 updates; rank 1 on node 0" in text
        assert "in loads_forever.<locals>.loop (tests/local/faulty_worker.py:" in text
        assert "the other ranks (1) wait in a collective" in text
