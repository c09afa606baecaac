"""The Ray of a Slurm job when it does not start, and when the first node is lost."""

from __future__ import annotations

import io
import re
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from launcher.errors import RunFailed
from launcher.run_dir import RunDir
from launcher.slurm import ray_cluster, ray_node
from launcher.slurm.allocation import Allocation
from launcher.slurm.ray_node import RayNode
from launcher.slurm.rendezvous import Connection, RendezvousServer
from launcher.slurm.startup_errors import StartupErrors
from tests.time_limit import TIME_LIMIT_SECONDS


def test_a_ray_that_exits_at_once_is_started_again_and_then_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    # Not a shell: dash clears its signal mask.
    python.write_text(
        f"#!{sys.executable}\nprint('no libstdc++ here')\nprint(open('/proc/self/status').read())\nexit(1)\n"
    )
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    log = io.BytesIO()
    ray = RayNode(Allocation("77", 0, 0, ("h1",), cpus=1, gpus=0), "127.0.0.1", None, log)
    with pytest.raises(RunFailed, match=r"Ray did not start on .* in 3 tries"):
        ray.start()
    ray.end()
    printed = log.getvalue().decode().splitlines()
    assert printed.count("no libstdc++ here") == 3
    # Slurm sends these to every process; Ray's must not end before the run has saved.
    (mask,) = {int(line.split()[1], 16) for line in printed if line.startswith("SigBlk:")}
    blocked = {number for number in signal.Signals if mask >> (number - 1) & 1}
    assert blocked == {signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}


def test_processes_of_a_ray_that_ended_by_itself_are_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their parents are gone, so that they are nobody's children; a rank has a session of its own."""
    rank = "import os, time; os.setsid(); time.sleep(600)"
    script = f"""
import subprocess, sys
subprocess.Popen([sys.executable, "-c", "import subprocess, sys; "
    "rank = subprocess.Popen([sys.executable, '-c', {rank!r}]); print(rank.pid, flush=True); rank.wait()"])
print("{ray_node._STARTED_TEXT}", flush=True)
sys.stdin.readline()
"""
    monkeypatch.setattr(RayNode, "_command", lambda *_: ([sys.executable, "-c", script], 0))
    allocation = Allocation(job_id="7", restart=0, node=0, hosts=("h1",), cpus=1, gpus=0)
    with (tmp_path / "node.log").open("wb") as log:
        node = RayNode(allocation, "127.0.0.1", "127.0.0.1:1", log)
        node.start()
        deadline = time.monotonic() + TIME_LIMIT_SECONDS
        while not (printed := re.findall(rb"^[0-9]+$", (tmp_path / "node.log").read_bytes(), re.M)) or not node.ended():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        pid = int(printed[0])
        parent = psutil.Process(pid).parent()
        node.end()
    assert parent is not None and not parent.is_running() and not psutil.pid_exists(pid)


@pytest.mark.parametrize("answers", [True, False])
def test_a_task_waits_for_the_removal_of_a_first_node_that_does_not_answer(
    monkeypatch: pytest.MonkeyPatch, answers: bool
) -> None:
    """A host answers that refuses the connection, since nobody listens there any more."""
    monkeypatch.setattr(ray_cluster, "_SHUTDOWN_SECONDS", 0.0)
    monkeypatch.setattr(ray_cluster, "_CHECK_SECONDS", 0.01)
    with socket.create_server(("127.0.0.1", 0)) as server:
        connection = Connection(socket.create_connection(server.getsockname()))
    if not answers:
        monkeypatch.setattr(connection, "peer_host_answers", lambda: False)
    listed = iter(["h[1-3]", "h[1-3]", "h[2-3]"])
    monkeypatch.setattr(ray_cluster, "slurm_job_hosts", lambda _: next(listed))
    allocation = Allocation(job_id="7", restart=0, node=1, hosts=("h1", "h2", "h3"), cpus=1, gpus=0)
    if answers:
        ray_cluster._wait_for_removal(connection, allocation)
        assert next(listed) == "h[1-3]"
    else:
        with pytest.raises(ray_cluster.FirstNodeLost):
            ray_cluster._wait_for_removal(connection, allocation)
    connection.close()


@pytest.mark.parametrize("answers", [True, False])
def test_a_first_node_that_does_not_answer_is_looked_up_while_ray_runs(
    monkeypatch: pytest.MonkeyPatch, answers: bool
) -> None:
    """After a loss of power no connection is closed, and Ray may take many minutes to notice."""
    monkeypatch.setattr(ray_cluster, "_ASK_SECONDS", 0.0)
    monkeypatch.setattr(ray_cluster, "_ASKS_PER_SECOND", 1000)
    monkeypatch.setattr(ray_cluster, "_CHECK_SECONDS", 0.01)
    listed: list[str] = []

    def hosts_of(_: str) -> str:
        listed.append("h[1-3]" if len(listed) < 2 else "h[2-3]")
        return listed[-1]

    monkeypatch.setattr(ray_cluster, "slurm_job_hosts", hosts_of)
    allocation = Allocation(job_id="7", restart=0, node=1, hosts=("h1", "h2", "h3"), cpus=1, gpus=0)
    ray = SimpleNamespace(ended=lambda: False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        connection = Connection(socket.create_connection(server.getsockname()))
        accepted, _ = server.accept()
        monkeypatch.setattr(connection, "peer_host_answers", lambda: answers)
        if answers:
            threading.Timer(0.3, accepted.close).start()
            assert ray_cluster._keep_running(ray, connection, allocation) is False  # type: ignore[arg-type]
            assert listed == []
        else:
            with pytest.raises(ray_cluster.FirstNodeLost):
                ray_cluster._keep_running(ray, connection, allocation)  # type: ignore[arg-type]
            assert listed == ["h[1-3]", "h[1-3]", "h[2-3]"]
        accepted.close()
    connection.close()


@pytest.mark.parametrize(
    ("present", "lost", "acts"),
    [
        ("h[1-3]", False, False),
        ("h[2-3]", True, True),
        ("h3", True, False),
        ("", False, False),
        ("other", False, False),
    ],
)
def test_the_first_node_is_lost_if_slurm_has_removed_it_from_the_job(
    monkeypatch: pytest.MonkeyPatch, present: str, lost: bool, acts: bool
) -> None:
    """Seen from h2; the first of the nodes that are left acts for all."""
    monkeypatch.setattr(ray_cluster, "slurm_job_hosts", lambda _: present or None)
    allocation = Allocation(job_id="7", restart=0, node=1, hosts=("h1", "h2", "h3"), cpus=1, gpus=0)
    if not lost:
        ray_cluster._check_first_node(allocation)
        return
    with pytest.raises(ray_cluster.FirstNodeLost, match=r"the first node of the job \(h1\) is lost") as error:
        ray_cluster._check_first_node(allocation)
    assert error.value.acts == acts


@pytest.mark.parametrize("may_lose_nodes", [True, False])
def test_a_node_without_an_order_leaves_when_the_first_one_ends(tmp_path: Path, may_lose_nodes: bool) -> None:
    allocation = Allocation(job_id="7", restart=0, node=1, hosts=("h1", "h2"), cpus=1, gpus=0)
    run = RunDir(tmp_path / "run")
    run.cluster.mkdir(parents=True)
    ray_cluster._key_file(run.cluster).write_text("key")
    server = RendezvousServer(ray_cluster._rendezvous_file(run, allocation), "key", 1)
    server.publish()
    errors = StartupErrors(run, allocation)
    with ThreadPoolExecutor() as pool:
        node = pool.submit(
            ray_cluster.other_node, allocation, run, 60.0, errors, lambda: None, may_lose_nodes=may_lose_nodes
        )
        assert len(server.wait(TIME_LIMIT_SECONDS)) == 1
        assert not may_lose_nodes or server.wait_for_ends(TIME_LIMIT_SECONDS) == []
        server.close()
        assert node.result(TIME_LIMIT_SECONDS) is None
