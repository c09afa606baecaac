"""logs, status, watch and why on a real run in which a rank raises: during the run, after it, and on a copy."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.run_dir import RunDir
from tests.local import launcher_commands
from tests.local.launcher_commands import Command, run_folder, updates_made, write_job
from tests.local.rank_runs import merged
from tests.time_limit import TIME_LIMIT_SECONDS
from tests.unit.inputs import command

pytestmark = pytest.mark.local

HOST = socket.gethostname()


def launcher(*arguments: str, folder: Path) -> subprocess.Popen[str]:
    """Starts the real command."""
    return subprocess.Popen(
        [str(Path(sys.executable).with_name("launcher")), *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def said(*arguments: str) -> str:
    """What a command prints in this process. It must succeed."""
    ended = command(*arguments)
    assert (ended.status, ended.err) == (0, "")
    return ended.out


def parts(line: str) -> tuple[str, ...]:
    """The name of a line's file, its time, and its text."""
    return tuple(line.split(None, 2))


def test_logs_status_watch_and_why_report_a_rank_that_raises(job_dict, tmp_path, monkeypatch, shared_ray):
    signal = tmp_path / "raise"
    cluster = {"env": {"LAUNCHER_RAISE_WHEN": str(signal)}}
    job = write_job(tmp_path, merged(job_dict, train={"max_steps": 100_000}, cluster=cluster))
    monkeypatch.setattr(launcher_commands, "LAUNCHER", launcher_commands.launcher_with("raising_worker"))
    running = Command("run", str(job), folder=tmp_path, **shared_ray)
    running.wait_for(lambda: run_folder(tmp_path) is not None)
    run = RunDir(run_folder(tmp_path))
    # Both start before there is a log, and end by themselves.
    following = launcher("logs", str(run.path), "-f", folder=tmp_path)
    watching = launcher("watch", run.path.name, folder=tmp_path)
    running.wait_for(lambda: updates_made(tmp_path) >= 5)
    live = json.loads(said("status", str(run.path), "--json"))
    signal.touch()
    assert running.wait() == 1, running.output
    followed, errors = following.communicate(timeout=TIME_LIMIT_SECONDS)
    assert (following.returncode, errors) == (0, "")
    watched, errors = watching.communicate(timeout=TIME_LIMIT_SECONDS)
    assert (watching.returncode, errors) == (0, "")

    assert (live["state"], live["written_state"]) == ("training", "training")
    assert live["total_updates"] == 100_000 and live["updates"] >= 5
    assert [node["host"] for node in live["nodes"]] == [HOST]

    ended = json.loads(said("status", run.path.name, "--output-dir", str(tmp_path / "runs"), "--json"))
    assert ended["state"] == "failed" and ended["updates"] >= live["updates"]
    assert ended["nodes"][0]["ranks"] == [0, 1]
    assert 1 in ended["nodes"][0]["exit_codes"]

    # `logs -f` printed each line of the files once, under the file's name.
    lines = [
        parts(f"{path.parent.name}/{path.stem} {line}")
        for path in run.logs.glob("*/*.log")
        for line in path.read_text().splitlines()
    ]
    assert sorted(map(parts, followed.splitlines())) == sorted(lines)
    past = said("logs", str(run.path))
    assert sorted(map(parts, past.splitlines())) == sorted(lines)
    only = said("logs", str(run.path), "--rank", "1", "--grep", "on fire", "--tail", "1")
    assert only.startswith(f"node-0-{HOST}/rank-1 ") and "RuntimeError: the disk of this node is on fire" in only

    why = said("why", str(run.path))
    head = f"rank 1 on node 0 ({HOST}) failed first, with exit code 1: RuntimeError: the disk of this node is on fire"
    assert why.startswith(f"{head}\n")
    assert str(run.node_logs(0, HOST) / "rank-1.log") in why
    # The other rank waited for it in a collective.
    assert f"1 other rank failed because a peer was lost: rank 0 on node 0 ({HOST})" in why
    # The run said the same by itself, and so does a copy of its directory, and watch at its end.
    assert f"error: {why.rstrip()}" in running.output
    assert head in watched and watched.startswith(("planning", "preparing", "placing"))
    copy = shutil.copytree(run.path, tmp_path / "copied")
    assert said("why", str(copy)).startswith(f"{head}\n")
    assert running.left_behind() == []


def test_cancel_now_saves_no_checkpoint_and_leaves_no_process(job_dict, tmp_path, shared_ray):
    running = Command(
        "run", str(write_job(tmp_path, merged(job_dict, train={"max_steps": 100_000}))), folder=tmp_path, **shared_ray
    )
    running.wait_for(lambda: updates_made(tmp_path) >= 2)
    told = said("cancel", "tiny", "--now", "--output-dir", str(tmp_path / "runs"))
    run = RunDir(run_folder(tmp_path))
    made = len(run.metrics())
    reason = run.state()["reason"]
    assert reason.startswith("cancelled by ")
    assert told == f"{run.path.name}: stop requested, at once\nstopped: {reason}; updates made: {made}\n"
    assert running.wait() == 128 + signal.SIGTERM, running.output
    assert running.left_behind() == []
    assert run.complete_checkpoints() == [] and "Traceback" not in running.output
    assert said("why", str(run.path)) == f"no failure: the run was stopped after {made} updates: {reason}\n"
    # What the node last told of itself is of its end, and of the time before it.
    last = json.loads(run.node_file(0, HOST).read_text())
    assert last["ended"] and last["cpu_percent"] > 0 and last.get("oom_kills", 0) == 0
    assert [rank["alive"] for rank in last["ranks"]] == [False, False]
