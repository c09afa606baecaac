"""Nodes that are lost or cut off during a run: the run restarts by itself on the nodes that there are."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from launcher.run_dir import RunDir
from tests.cluster.conftest import need
from tests.cluster.hosts import CPU_ONLY, Hosts, missing, several_hosts
from tests.cluster.ray_cluster import RayCluster
from tests.cluster.slurm import Slurm
from tests.cluster.test_slurm import ended, how_it_stands, of_launcher, sbatch, wait_for
from tests.cluster.test_slurm_resubmit import logs_of, state_of, submit
from tests.cluster.tiny_jobs import runs_of, write_tiny_job

pytestmark = pytest.mark.cluster


@pytest.fixture
def cluster() -> Iterator[RayCluster]:
    need(missing())
    with several_hosts(3) as hosts:
        hosts.environment.update({**CPU_ONLY, **hosts.start_fork_servers()})
        yield RayCluster(hosts, cpus=1).start()


def test_a_run_continues_on_two_nodes_when_the_third_is_powered_off(cluster: RayCluster) -> None:
    folder = cluster.hosts.shared
    job = write_tiny_job(
        folder,
        cluster={"nodes": 3, "min_nodes": 2, "wait_seconds": 5},
        train={"max_steps": 40, "restarts": 3},
        checkpoint={"every": 5, "keep": 2},
        export=False,
    )
    running = cluster.popen("h1", "launcher", "run", str(job), RAY_ADDRESS="h1:6379")
    running.wait_for(lambda: any(len(run.metrics()) >= 8 for run in runs_of(folder)), seconds=240)
    [run] = runs_of(folder)
    cluster.hosts.power_off("h3")
    assert running.wait(seconds=300) == 0, running.output
    metrics = run.metrics()
    assert [line["update"] for line in metrics] == list(range(40))
    assert [line["samples"] for line in metrics] == [12 * (update + 1) for update in range(40)]
    # After its warm-up of two updates the learning rate falls by the same amount per update, also across the restart.
    steps = np.diff([line["lr"] for line in metrics[2:]])
    np.testing.assert_allclose(steps, steps[0], rtol=1e-6)
    [restart] = [event for event in run.events() if event["event"] == "restart"]
    # Whether a rank that lost its peer or the lost node is noticed first is a matter of how busy the machine is.
    assert restart["update"] > 0
    assert "continuing on 2 nodes instead of 3" in running.output


@pytest.mark.parametrize("min_nodes", [2, None])
def test_a_run_saves_and_leaves_a_node_that_ray_drains(cluster: RayCluster, min_nodes: int | None) -> None:
    folder = cluster.hosts.shared
    fewer = {"min_nodes": min_nodes} if min_nodes else {}
    job = write_tiny_job(
        folder,
        cluster={"nodes": 3, "wait_seconds": 5, **fewer},
        train={"max_steps": 1000, "restarts": 3},
        export=False,
    )
    running = cluster.popen("h1", "launcher", "run", str(job), RAY_ADDRESS="h1:6379")
    running.wait_for(lambda: any(len(run.metrics()) >= 8 for run in runs_of(folder)), seconds=240)
    [run] = runs_of(folder)
    cluster.drain("h3", seconds=100)
    if min_nodes is None:
        assert running.wait(seconds=240) == 1, running.output
        assert "not enough free nodes" in running.output
    else:
        running.wait_for(lambda: "continuing on 2 nodes instead of 3" in running.output, seconds=240)
    made = run.complete_checkpoints()[-1]
    assert made >= 8 and "node 2 (h3): Ray drains it, and ends it in" in running.output
    if min_nodes:
        running.wait_for(lambda: len(run.metrics()) >= made + 2, seconds=240)
    [restart] = [event for event in run.events() if event["event"] == "restart"]
    assert restart["update"] == made and list(run.path.glob("metrics.undone-*")) == []
    if min_nodes:
        running.signal()
        running.wait()
        assert [line["update"] for line in run.metrics()] == list(range(len(run.metrics())))


@pytest.fixture
def real_timeout(slurm: Slurm) -> Iterator[None]:
    """Slurm counts a host as dead after five minutes, as in a real cluster; the testbed's does so sooner."""
    before = slurm.conf.read_text()
    slurm.conf.write_text(re.sub(r"(?m)^SlurmdTimeout=.*$", "SlurmdTimeout=300", before))
    slurm.hosts.run("ctl", ["scontrol", "reconfigure"])
    yield
    slurm.conf.write_text(before)
    slurm.hosts.run("ctl", ["scontrol", "reconfigure"])


def kill_the_task(hosts: Hosts, host: str) -> None:
    """Ends the task on a host with all that it started, as Slurm does where tasks are in control groups."""
    for process in hosts.processes(host):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "slurm" not in process.name():
                process.kill()


@pytest.mark.parametrize("loss", ["powered off", "its task is killed"])
@pytest.mark.usefixtures("real_timeout")
def test_a_slurm_job_continues_on_two_of_three_nodes(slurm: Slurm, shared: Path, loss: str) -> None:
    hosts, told = slurm.hosts, logs_of(shared)
    slurm.wait_idle()
    sections = {
        "cluster": {"nodes": 3, "min_nodes": 2, "wait_seconds": 5},
        "train": {"max_steps": 60, "restarts": 3},
        "checkpoint": {"every": 5, "keep": 2},
        "slurm": {"nodelist": "h[1-3]"},
        "export": False,
    }
    job = submit(hosts, write_tiny_job(shared, "three", **sections))
    run = RunDir(shared / "runs" / f"three-slurm-{job}")
    wait_for(lambda: len(run.metrics()) >= 8, told)
    if loss == "powered off":
        hosts.power_off("h3")
    else:
        kill_the_task(hosts, "h3")
    try:
        wait_for(lambda: run.state().get("state") == "finished", told)
        # Sooner than Slurm counts the host as dead; until then the job is "completing" there.
        wait_for(lambda: state_of(hosts, job) != "RUNNING", told, seconds=120)
        assert " ExitCode=0:0" in hosts.run("ctl", ["scontrol", "show", "job", job]).stdout
    finally:
        if loss == "powered off":
            hosts.power_on("h3")
    wait_for(lambda: state_of(hosts, job) == "COMPLETED", told, seconds=120)
    assert "continuing on 2 nodes instead of 3" in " ".join(told().split())
    assert [line["update"] for line in run.metrics()] == list(range(60))
    assert [line["samples"] for line in run.metrics()] == [12 * (update + 1) for update in range(60)]
    steps = np.diff([line["lr"] for line in run.metrics()[2:]])
    np.testing.assert_allclose(steps, steps[0], rtol=1e-6)
    slurm.wait_idle(seconds=90)
    assert of_launcher(hosts) == []


def test_a_slurm_job_that_lost_its_first_node_is_queued_again(slurm: Slurm, shared: Path) -> None:
    """With --no-kill, Slurm itself would keep the job without its batch script until the time limit."""
    hosts = slurm.hosts
    slurm.wait_idle()
    sections = {
        "cluster": {"nodes": 3, "min_nodes": 2},
        "train": {"max_steps": 100_000},
        "slurm": {"nodelist": "h[1-3]"},
    }
    job = submit(hosts, write_tiny_job(shared, "first", **sections))
    run = RunDir(shared / "runs" / f"first-slurm-{job}")
    wait_for(lambda: len(run.metrics()) >= 2, logs_of(shared))

    def described() -> str:
        # What the other tasks print goes through srun on the first host, which is off.
        logs = "\n".join(f"== {log}\n{log.read_text()}" for log in sorted(run.path.glob("logs/*/node.log")))
        return f"{how_it_stands(hosts, shared, job)}\n{logs}\n{hosts.command_lines('h2')}\n{slurm.logs()}"

    # As after a loss of power: no connection is closed.
    hosts.cut("h1")
    hosts.power_off("h1")
    try:
        wait_for(lambda: state_of(hosts, job) == "PENDING", described, seconds=300)
        hosts.run("ctl", ["scancel", job])
    finally:
        hosts.power_on("h1")
        slurm.wait_idle(seconds=90)
    assert of_launcher(hosts) == []


@pytest.mark.usefixtures("real_timeout")
def test_a_run_survives_cuts_of_three_and_sixty_seconds(slurm: Slurm, shared: Path) -> None:
    """The second host of a Slurm job is cut off the network; afterwards it joins again, and the run continues."""
    hosts = slurm.hosts
    slurm.wait_idle()
    long = {"train": {"max_steps": 100_000, "restarts": 3}, "checkpoint": {"every": 10, "keep": 2}}
    job = sbatch(hosts, write_tiny_job(shared, "cut", **long), "--nodes=2", "--nodelist=h1,h2", fresh=True)
    run = RunDir(shared / "runs" / f"cut-slurm-{job}")

    def described() -> str:
        return how_it_stands(hosts, shared, job)

    wait_for(lambda: len(run.metrics()) >= 12, described)
    for seconds in (3, 60):
        made = len(run.metrics())
        hosts.cut("h2")
        time.sleep(seconds)
        hosts.join("h2")
        wait_for(lambda made=made: len(run.metrics()) >= made + 5, described, seconds=150)
    print(described())
    updates = [line["update"] for line in run.metrics()]
    assert updates == list(range(len(updates)))
    restarts = [event for event in run.events() if event["event"] == "restart"]
    assert len(restarts) >= 1 and run.attempt() == 1 + len(restarts)
    hosts.run("ctl", ["scancel", job])
    assert ended(hosts, shared, job)[0].startswith("CANCELLED")
    assert of_launcher(hosts) == []
