"""Nodes that are lost or cut off during a run: the run restarts by itself on the nodes that there are."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from launcher.run_dir import RunDir
from tests.cluster.conftest import need
from tests.cluster.hosts import CPU_ONLY, missing, several_hosts
from tests.cluster.ray_cluster import RayCluster
from tests.cluster.slurm import Slurm
from tests.cluster.test_slurm import ended, how_it_stands, of_launcher, sbatch, wait_for
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


def test_a_run_survives_cuts_of_three_and_sixty_seconds(slurm: Slurm, shared: Path) -> None:
    """The second host of a Slurm job is cut off the network; afterwards it joins again, and the run continues."""
    hosts = slurm.hosts
    slurm.wait_idle()
    before = slurm.conf.read_text()
    # As in a real cluster; the testbed's Slurm counts a host as dead sooner.
    slurm.conf.write_text(re.sub(r"(?m)^SlurmdTimeout=.*$", "SlurmdTimeout=300", before))
    hosts.run("ctl", ["scontrol", "reconfigure"])
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
    slurm.conf.write_text(before)
    hosts.run("ctl", ["scontrol", "reconfigure"])
