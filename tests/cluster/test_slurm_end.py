"""How Slurm ends runs: scancel and requeue leave time to save, and a node dies."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from launcher.run_dir import RunDir
from tests.cluster.hosts import Hosts
from tests.cluster.slurm import Slurm
from tests.cluster.test_slurm import ended, how_it_stands, of_launcher, sbatch, wait_for
from tests.cluster.tiny_jobs import write_tiny_job

pytestmark = pytest.mark.cluster

_OF_RAY = re.compile(r'"(gcs_server|raylet|ray::[A-Za-z]*)"')


def job_state(hosts: Hosts, job: str) -> str:
    found = re.search(r"JobState=(\S+)", hosts.run("ctl", ["scontrol", "show", "job", job]).stdout)
    assert found
    return found[1]


def beyond_loopback(hosts: Hosts, host: str) -> list[str]:
    """Where Ray's processes on a host take connections from other machines."""
    listed = hosts.run(host, ["ss", "--tcp", "--listening", "--numeric", "--processes", "--no-header"]).stdout
    lines = [line for line in listed.splitlines() if _OF_RAY.search(line)]
    assert {name for line in lines for name in _OF_RAY.findall(line)} >= {"gcs_server", "raylet"}, listed
    return [line for line in lines if "127.0.0.1" not in line.split()[3]]


def saved_everything(run: RunDir) -> bool:
    return run.state()["state"] == "stopped" and run.complete_checkpoints()[-1] == len(run.metrics())


def test_scancel_and_requeue_save_and_a_dead_node_ends_the_allocation(slurm: Slurm, shared: Path) -> None:
    hosts = slurm.hosts
    slurm.wait_idle()
    long = {"train": {"max_steps": 100_000}}
    one = sbatch(
        hosts,
        write_tiny_job(shared, "one", **long),
        "--nodes=1",
        "--nodelist=h3",
        overrides=("cluster.nodes=1",),
        fresh=True,
    )
    two = sbatch(hosts, write_tiny_job(shared, "two", **long), "--nodes=2", "--nodelist=h1,h2", fresh=True)
    run_one, run_two = (RunDir(shared / "runs" / f"{name}-slurm-{job}") for name, job in (("one", one), ("two", two)))

    def told() -> str:
        return "\n".join(how_it_stands(hosts, shared, job) for job in (one, two))

    wait_for(lambda: min(len(run.metrics()) for run in (run_one, run_two)) >= 2, told)
    assert beyond_loopback(hosts, "h3") == []

    # Both send SIGTERM to every process of the job's tasks, and SIGKILL after KillWait.
    hosts.run("ctl", ["scancel", one])
    hosts.run("ctl", ["scontrol", "requeue", two])
    assert ended(hosts, shared, one)[0].startswith("CANCELLED")
    wait_for(lambda: job_state(hosts, two) == "PENDING", told)
    assert saved_everything(run_one), told()
    assert saved_everything(run_two), told()
    made = len(run_two.metrics())
    assert of_launcher(hosts) == []

    # Slurm would wait two minutes before it starts a requeued job.
    hosts.run("ctl", ["scontrol", "update", f"JobId={two}", "StartTime=now+2"])
    wait_for(lambda: len(run_two.metrics()) >= made + 2, told)
    assert f"after update {made}" in told()
    assert [line["update"] for line in run_two.metrics()] == list(range(len(run_two.metrics())))

    hosts.power_off("h2")
    try:
        # srun would wait forever for the dead host's task.
        wait_for(lambda: job_state(hosts, two) not in ("RUNNING", "COMPLETING"), told, seconds=120)
        assert run_two.state()["state"] == "failed", told()
        assert "node 1 (h2) is lost" in told()
    finally:
        hosts.power_on("h2")
        # Slurm may have requeued it.
        hosts.run("ctl", ["scancel", two], check=False)
        slurm.wait_idle(seconds=90)
