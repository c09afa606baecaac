"""Ranks that are forks of one warm process: what they compute, and what happens when processes of a node end."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from launcher.run_dir import RunDir
from tests.local.launcher_commands import RAYS_OWN_AGENTS, Command, run_folder, updates_made, write_job
from tests.local.rank_runs import merged
from tests.time_limit import TIME_LIMIT_SECONDS

pytestmark = pytest.mark.local


@pytest.fixture(autouse=True)
def _no_shared_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher starts its own fork server, as users' launchers do."""
    monkeypatch.delenv("LAUNCHER_FORK_SERVER", raising=False)


def started(folder: Path, job: dict, *options: str) -> Command:
    folder.mkdir()
    return Command("run", str(write_job(folder, job)), *options, folder=folder)


def results(folder: Path) -> dict[str, object]:
    """What the ranks compute: losses, learning rates, gradient norms, evaluations and the exported weights."""
    run = RunDir(run_folder(folder))
    weights = (run.export / "model.safetensors").read_bytes()
    metrics = [(line["loss"], line["lr"], line["grad_norm"]) for line in run.metrics()]
    return {"metrics": metrics, "weights": hashlib.sha256(weights).hexdigest()}


def agent_log(folder: Path) -> str:
    (log,) = RunDir(run_folder(folder)).logs.glob("node-0-*/agent.log")
    return log.read_text()


def fork_servers(running: Command) -> list[psutil.Process]:
    """The fork servers that a launcher or its agent has started."""
    return fork_servers_below(running.process.pid)


def fork_servers_below(launcher: int) -> list[psutil.Process]:
    return [process for process in psutil.Process(launcher).children(recursive=True) if is_fork_server(process)]


def is_fork_server(process: psutil.Process) -> bool:
    """False for a process that has ended since it was listed."""
    with suppress(psutil.NoSuchProcess):
        return process.cmdline()[-1:] == ["launcher.worker.fork_server"]
    return False


def test_forked_ranks_compute_what_fresh_ones_do_also_after_a_restart(job_dict: dict, tmp_path: Path) -> None:
    """To the last bit, with a rank that is killed in the middle of the forked run."""
    # Enough updates that the ranks are still there when the test looks at them.
    job = merged(job_dict, train={"max_steps": 300, "eval_every": 100, "restarts": 3}, checkpoint={"every": 50})
    fresh = started(tmp_path / "fresh", merged(job, cluster={"warm_start": False}))
    fresh.wait_for(lambda: updates_made(fresh.folder) > 0)
    assert fork_servers(fresh) == []
    assert fresh.wait() == 0, fresh.output

    forked = started(tmp_path / "forked", job)
    forked.wait_for(lambda: len(forked.ranks()) == 2 and updates_made(forked.folder) > 60)
    (server,) = fork_servers(forked)
    first = forked.ranks()
    assert {rank.ppid() for rank in first.values()} == {server.pid}
    first[1].kill()
    forked.wait_for(lambda: len(forked.ranks()) == 2 and forked.ranks()[1].pid != first[1].pid)
    assert {rank.ppid() for rank in forked.ranks().values()} == {server.pid}
    assert forked.wait() == 0, forked.output
    assert results(forked.folder) == results(fresh.folder)
    assert RunDir(run_folder(forked.folder)).attempt() == 2
    assert "fresh" not in agent_log(forked.folder)
    assert forked.left_behind(*RAYS_OWN_AGENTS) == []


def test_a_fork_server_that_is_killed_ends_the_attempt_and_is_replaced(job_dict: dict, tmp_path: Path) -> None:
    running = started(
        tmp_path / "run", merged(job_dict, train={"max_steps": 40, "restarts": 3}, checkpoint={"every": 10})
    )
    running.wait_for(lambda: updates_made(running.folder) > 10)
    (server,) = fork_servers(running)
    server.kill()
    assert running.wait() == 0, running.output
    assert RunDir(run_folder(running.folder)).attempt() == 2
    assert updates_made(running.folder) == 40
    assert running.left_behind(*RAYS_OWN_AGENTS) == []


def test_a_killed_launcher_leaves_no_fork_server(job_dict: dict, tmp_path: Path) -> None:
    running = started(tmp_path / "run", merged(job_dict, train={"max_steps": 100_000}, checkpoint={"every": None}))
    running.wait_for(lambda: updates_made(running.folder) > 0)
    (server,) = fork_servers(running)
    os.kill(running.process.pid, 9)
    running.process.wait()
    assert running.left_behind(*RAYS_OWN_AGENTS, seconds=30) == [] and not server.is_running()


def test_a_run_in_the_background_has_the_fork_server_of_its_own_process(job_dict: dict, tmp_path: Path) -> None:
    job = merged(job_dict, train={"max_steps": 100_000}, checkpoint={"every": None})
    planned = started(tmp_path / "run", job, "--detach")
    assert planned.wait() == 0, planned.output
    run = RunDir(run_folder(planned.folder))
    launcher = psutil.Process(run.holder().pid)
    deadline = time.monotonic() + TIME_LIMIT_SECONDS
    while not updates_made(planned.folder):
        assert time.monotonic() < deadline and launcher.is_running(), run.console_file.read_text()
        time.sleep(0.1)
    (server,) = fork_servers_below(launcher.pid)
    assert {rank.ppid() for rank in planned.ranks().values()} == {server.pid} and server.ppid() == launcher.pid
    left = [launcher, *launcher.children(recursive=True)]
    launcher.terminate()
    _, alive = psutil.wait_procs(left, TIME_LIMIT_SECONDS)
    assert alive == [] and planned.left_behind() == []


def test_a_script_may_be_run_in_forks(tmp_path: Path) -> None:
    """The ranks of plain_ddp.py have torch imported at their start, and make a process group and all updates."""
    shutil.copy(Path(__file__).parent / "scripts" / "plain_ddp.py", tmp_path)
    job = {
        "name": "mine",
        "train": {"max_steps": 4, "train_micro_batch_size_per_gpu": 2},
        "schedule": {"shape": "linear", "peak_lr": 1e-3, "warmup": 1},
        "cluster": {"gpus_per_node": 0, "processes_per_node": 2, "warm_start": True},
    }
    running = Command(
        "exec", str(write_job(tmp_path, job)), "--", "-m", "plain_ddp", "--report", "--steps", "4", folder=tmp_path
    )
    running.wait_for(lambda: len(running.ranks()) == 2)
    (server,) = fork_servers(running)
    assert {rank.ppid() for rank in running.ranks().values()} == {server.pid}
    assert running.wait() == 0, running.output
    assert "fresh" not in agent_log(tmp_path) and updates_made(tmp_path) == 4
    assert running.left_behind(*RAYS_OWN_AGENTS) == []
