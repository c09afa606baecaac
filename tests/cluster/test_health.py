"""Health checks over several hosts: a slow link and a device that computes wrongly, each named with its node."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.cluster.conftest import need
from tests.cluster.hosts import CPU_ONLY, missing, several_hosts
from tests.cluster.ray_cluster import RayCluster
from tests.cluster.tiny_jobs import runs_of, write_tiny_job
from tests.wrong_products import wrong_products

pytestmark = pytest.mark.cluster

RAY = {"RAY_ADDRESS": "h1:6379"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    need(missing())
    with several_hosts(3) as hosts:
        hosts.environment.update({**CPU_ONLY, **hosts.start_fork_servers()})
        yield RayCluster(hosts, cpus=1).start()


def test_a_node_with_a_slow_link_is_named_and_the_run_continues(cluster: RayCluster) -> None:
    folder = cluster.hosts.shared / "slow"
    folder.mkdir()
    job = write_tiny_job(folder, cluster={"nodes": 3}, train={"max_steps": 1}, export=False)
    cluster.hosts.slow_down("h2", "40mbit")
    try:
        done = cluster.run("h1", "launcher", "run", str(job), seconds=400, **RAY)
    finally:
        cluster.hosts.full_speed("h2")
    [run] = runs_of(folder)
    health = {event["host"]: event for event in run.events() if event["event"] == "health"}
    assert list(health) == ["h1", "h2", "h3"]
    slow = [host for host, event in health.items() if "bandwidth" in [each["check"] for each in event["failed"]]]
    assert slow == ["h2"], json.dumps(health)
    assert "node 1 (h2): its better link has " in " ".join(done.stdout.split())
    # 40 Mbit/s are 5 MB/s.
    assert max(health["h2"]["links"].values()) < 5.5e6 < health["h1"]["links"]["2"]
    assert health["h1"]["ring_bytes_per_second"] < 11e6
    assert all(event["matmuls"][0]["wrong"] == 0 for event in health.values())


def test_doctor_names_the_node_whose_device_multiplies_wrongly(cluster: RayCluster) -> None:
    folder = cluster.hosts.shared / "wrong"
    folder.mkdir()
    env = wrong_products(folder / "faulty", "h3")
    job = write_tiny_job(folder, cluster={"nodes": 3, "env": env})
    done = cluster.run("h1", "launcher", "doctor", str(job), seconds=400, check=False, **RAY)
    assert done.returncode == 1, done.stdout
    assert "error: node 2 (h3): CPU multiplies wrongly" in " ".join(done.stderr.split())
    assert "(h1)" not in done.stderr and "(h2)" not in done.stderr
    assert "unfit" in done.stdout and "TFLOP/s" in done.stdout
    assert runs_of(folder) == []
