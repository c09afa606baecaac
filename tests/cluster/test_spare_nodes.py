"""Spare nodes, nodes that return, and nodes that are excluded: a run continues with the nodes that are left."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import pytest

from launcher.run_dir import RunDir
from tests.cluster.conftest import need
from tests.cluster.hosts import CPU_ONLY, HostProcess, Hosts, missing, several_hosts
from tests.cluster.ray_cluster import RayCluster
from tests.cluster.slurm import Slurm
from tests.cluster.test_slurm import WITH_LAUNCHER, ended, how_it_stands, launcher, of_launcher, sbatch, wait_for
from tests.cluster.tiny_jobs import BIN, runs_of, write_tiny_job
from tests.wrong_products import wrong_products

pytestmark = pytest.mark.cluster

LONG: dict[str, Any] = {
    "train": {"max_steps": 100_000, "restarts": 3},
    "checkpoint": {"every": 5, "keep": 2},
    "export": False,
}


@pytest.fixture
def cluster() -> Iterator[RayCluster]:
    need(missing())
    with several_hosts(3) as hosts:
        hosts.environment.update({**CPU_ONLY, **hosts.start_fork_servers()})
        yield RayCluster(hosts, cpus=1)


def test_a_spare_node_takes_over_and_a_host_that_returns_is_used_again(cluster: RayCluster) -> None:
    folder, hosts = cluster.hosts.shared, cluster.hosts
    # The run would fail if it waited for another node as long as this.
    job = write_tiny_job(folder, cluster={"nodes": 2, "spare_nodes": 1, "wait_seconds": 3600}, **LONG)
    cluster.start()
    running = cluster.popen("h1", "launcher", "run", str(job), RAY_ADDRESS="h1:6379")
    running.wait_for(lambda: any(len(run.metrics()) >= 8 for run in runs_of(folder)), seconds=240)
    [run] = runs_of(folder)
    assert (hosts_in_order(run), spares_of(run)) == (["h1", "h2"], ["h3"])
    # A spare node that is lost changes nothing, and is one again when it has returned.
    hosts.power_off("h3")
    running.wait_for(lambda: "spare node h3 is lost" in running.output)
    hosts.power_on("h3")
    cluster.join("h3")
    running.wait_for(lambda: "h3 is ready for the next restart" in running.output)
    assert run.attempt() == 1

    hosts.power_off("h2")
    wait_for_updates(running, run)
    assert (hosts_in_order(run), spares_of(run)) == (["h1", "h3"], [])
    assert "spare node h3 takes the place of h2" in running.output
    # The fork server of the tests ended with the host, so the agent has started its own.
    assert (run.node_logs(1, "h3") / "imports.log").exists()
    assert "fresh" not in (run.node_logs(1, "h3") / "agent.log").read_text()
    hosts.power_on("h2")
    cluster.join("h2")
    running.wait_for(lambda: "h2 is ready for the next restart" in running.output)
    hosts.power_off("h3")
    wait_for_updates(running, run)
    assert hosts_in_order(run) == ["h1", "h2"]
    cluster.run("h1", "launcher", "cancel", str(run.path))
    running.wait(seconds=120)
    updates = [line["update"] for line in run.metrics()]
    assert updates == list(range(len(updates)))


def test_a_spare_node_takes_the_place_of_a_node_that_does_not_pass_the_check(cluster: RayCluster) -> None:
    """Another version of transformers is installed on the second host."""
    folder = cluster.hosts.shared
    other = folder / "other" / "transformers-4.0.0.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 4.0.0\n")
    cluster.own_environment["h2"] = {"PYTHONPATH": str(other.parent)}
    cluster.start()
    job = write_tiny_job(folder, cluster={"nodes": 2, "spare_nodes": 1}, export=False)
    done = cluster.run("h1", "launcher", "run", str(job), RAY_ADDRESS="h1:6379", seconds=240)
    [run] = runs_of(folder)
    assert hosts_in_order(run) == ["h1", "h3"] and spares_of(run) == []
    assert re.search(r"not using h2 any more: transformers 4.0.0, but \S+ in the plan", done.stdout)
    # Only this start of the run does without it: the user may install the other version.
    assert run.excluded_nodes() == {} and run.attempt() == 1


def test_a_spare_node_takes_the_place_of_a_node_that_multiplies_wrongly(cluster: RayCluster) -> None:
    folder = cluster.hosts.shared
    env = wrong_products(folder / "faulty", "h2")
    cluster.start()
    job = write_tiny_job(folder, cluster={"nodes": 2, "spare_nodes": 1, "env": env}, export=False)
    cluster.run("h1", "launcher", "run", str(job), RAY_ADDRESS="h1:6379", seconds=400)
    [run] = runs_of(folder)
    assert hosts_in_order(run) == ["h1", "h3"] and spares_of(run) == []
    [(host, reason)] = run.excluded_nodes().items()
    assert host == "h2" and reason.startswith("CPU multiplies wrongly") and run.attempt() == 1


def test_a_spare_node_takes_the_place_of_a_node_that_ray_drains(cluster: RayCluster) -> None:
    folder = cluster.hosts.shared
    # The run would fail if it waited for another node as long as this.
    job = write_tiny_job(folder, cluster={"nodes": 2, "spare_nodes": 1, "wait_seconds": 3600}, **LONG)
    cluster.start()
    running = cluster.popen("h1", "launcher", "run", str(job), RAY_ADDRESS="h1:6379")
    running.wait_for(lambda: any(len(run.metrics()) >= 8 for run in runs_of(folder)), seconds=240)
    [run] = runs_of(folder)
    assert (hosts_in_order(run), spares_of(run)) == (["h1", "h2"], ["h3"])
    cluster.drain("h2", seconds=600)
    wait_for_updates(running, run)
    assert (hosts_in_order(run), spares_of(run)) == (["h1", "h3"], [])
    assert "spare node h3 takes the place of h2" in running.output
    assert run.node_failures() == {} and not list(run.path.glob("metrics.undone-*"))
    cluster.run("h1", "launcher", "cancel", str(run.path))
    running.wait(seconds=120)


def test_a_node_that_failed_twice_is_excluded_and_slurm_keeps_the_job_without_it(slurm: Slurm, shared: Path) -> None:
    hosts = slurm.hosts
    slurm.wait_idle()
    job_file = write_tiny_job(shared, cluster={"nodes": 2, "spare_nodes": 1}, slurm={"cpus_per_task": 2}, **LONG)
    job = launcher(hosts, "submit", str(job_file), "--parsable").strip()
    run = RunDir(shared / "runs" / f"tiny-slurm-{job}")

    def told() -> str:
        printed = [path.read_text() for path in (shared / "runs").glob(f"*-slurm-{job}.log")]
        return "\n".join([how_it_stands(hosts, shared, job), *printed])

    kill_rank_twice(hosts, "h2", run, told)
    wait_for(lambda: hosts_in_order(run) == ["h1", "h3"], told)
    assert "spare node h3 takes the place of h2" in told()
    reason = "failed 2 times, the last time with rank 1: signal SIGKILL"
    assert run.excluded_nodes() == {"h2": reason}
    wait_for(lambda: run.state()["state"] == "training", told)
    assert f"excluded: h2 {reason}" in launcher(hosts, "status", str(run.path))

    hosts.power_off("h2")
    try:
        wait_for(lambda: slurm.states("h2")["h2"].startswith("down"), told, seconds=120)
        # A minute after the end of a task, srun --wait=60 would kill the others.
        made = len(run.metrics())
        ending = run.events()[-1]["time"]
        wait_for(lambda: seconds_between(ending, run.metrics()[-1]["time"]) > 75, told, seconds=240)
        assert len(run.metrics()) > made and hosts_in_order(run) == ["h1", "h3"]
        hosts.run("ctl", ["scancel", job])
    finally:
        hosts.power_on("h2")
        slurm.wait_idle(seconds=90)
    assert of_launcher(hosts) == []


def test_slurm_leaves_out_an_excluded_node_when_the_job_is_requeued(slurm: Slurm, shared: Path) -> None:
    hosts = slurm.hosts
    slurm.wait_idle()
    job = sbatch(hosts, write_tiny_job(shared, cluster={"nodes": 2}, **LONG), "--nodes=2", fresh=True)
    run = RunDir(shared / "runs" / f"tiny-slurm-{job}")

    def told() -> str:
        return how_it_stands(hosts, shared, job)

    kill_rank_twice(hosts, "h2", run, told)
    wait_for(lambda: run.attempt() == 3 and run.state()["state"] == "training", told)
    # There is no other node in the allocation.
    assert hosts_in_order(run) == ["h1", "h2"] and "h2" in run.excluded_nodes()
    assert "it is used until the run ends, since no other node is free" in told()
    hosts.run("ctl", ["scontrol", "requeue", job])
    for excluded in ("(null)", "h2"):
        wait_for(lambda excluded=excluded: f"ExcNodeList={excluded}" in told() and "JobState=PENDING" in told(), told)
        # Slurm would wait two minutes before it starts a requeued job.
        hosts.run("ctl", ["scontrol", "update", f"JobId={job}", "StartTime=now+2"])
    made = len(run.metrics())
    wait_for(lambda: len(run.metrics()) >= made + 5, told)
    assert "requeuing the Slurm job without h2" in told()
    assert hosts_in_order(run) == ["h1", "h3"]
    hosts.run("ctl", ["scancel", job])
    assert ended(hosts, shared, job)[0].startswith("CANCELLED")
    command = [str(BIN / "launcher"), "submit", "--to", "slurm", "--dry-run", "--resume", str(run.path)]
    assert "#SBATCH --exclude=h2\n" in hosts.run("ctl", command, **WITH_LAUNCHER).stdout
    assert of_launcher(hosts) == []


def kill_rank_twice(hosts: Hosts, host: str, run: RunDir, told: Any) -> None:
    """Kills the rank on a host, again after the run has restarted on it and made progress."""
    for attempt in (1, 2):
        wait_for(lambda attempt=attempt: run.attempt() == attempt and run.state()["state"] == "training", told)
        made = len(run.metrics())
        wait_for(lambda made=made: len(run.metrics()) >= made + 6, told)
        # For a moment there may be two: a process that the rank forks has its command line until it calls exec.
        wait_for(lambda: len(ranks_on(hosts, host)) == 1, lambda: f"{ranks_on(hosts, host)}\n{told()}", seconds=30)
        [rank] = ranks_on(hosts, host)
        rank.send_signal(signal.SIGKILL)


def ranks_on(hosts: Hosts, host: str) -> list[psutil.Process]:
    """The processes of ranks on a host."""
    return [process for process in hosts.processes(host) if "launcher.worker" in process.cmdline()]


def seconds_between(first: str, last: str) -> float:
    return (datetime.fromisoformat(last) - datetime.fromisoformat(first)).total_seconds()


def wait_for_updates(running: HostProcess, run: RunDir) -> None:
    """Waits until the run has restarted once more and made some updates since."""
    attempt = run.attempt()
    running.wait_for(lambda: run.attempt() > attempt, seconds=240)
    made = len(run.metrics())
    running.wait_for(lambda: len(run.metrics()) >= made + 8, seconds=240)


def hosts_in_order(run: RunDir) -> list[str]:
    """The hosts of the present attempt by node rank."""
    return [event["host"] for event in of_last_placing(run) if event["event"] == "node"]


def spares_of(run: RunDir) -> list[str]:
    return [event["host"] for event in of_last_placing(run) if event["event"] == "spare_node"]


def of_last_placing(run: RunDir) -> list[dict[str, Any]]:
    events = run.events()
    placings = [index for index, event in enumerate(events) if event.get("state") == "placing"]
    return events[placings[-1] :]
