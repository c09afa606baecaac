"""Runs on a Ray cluster over three hosts: submitting, sharing, waiting, and the losses they reach."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from launcher.run_dir import RunDir
from tests.cluster.conftest import need
from tests.cluster.hosts import CPU_ONLY, Hosts, missing, several_hosts
from tests.cluster.ray_cluster import RayCluster
from tests.cluster.tiny_jobs import BIN, hosts_of_ranks, losses, runs_of, write_fault, write_tiny_job

pytestmark = pytest.mark.cluster

CPUS = 2
"""Per host: two runs with one rank per host fill it."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    """Ray over separate hosts, which other tests cannot power off."""
    need(missing())
    with several_hosts(3) as hosts:
        hosts.environment.update({**CPU_ONLY, **hosts.start_fork_servers()})
        yield RayCluster(hosts, CPUS).start()


def only_run(folder: Path, name: str) -> RunDir:
    [run] = runs_of(folder, name)
    return run


def ranks_on(hosts: Hosts) -> list[str]:
    """Ranks that still run, started or forked."""
    started = [
        " ".join(line) for host in hosts.names for line in hosts.command_lines(host) if "launcher.worker" in line
    ]
    return [*started, *(f"{host}: process {fork.pid}" for host in hosts.names for fork in hosts.forks(host))]


def span(run: RunDir) -> tuple[str, str]:
    """When a run had its nodes: from starting ranks to its end."""
    times = {event["state"]: event["time"] for event in run.events() if event["event"] == "state"}
    return times["starting"], times["finished"]


def test_runs_share_a_cluster_wait_for_room_and_make_the_updates_of_one_node(cluster: RayCluster) -> None:
    """Runs on two, three and one host at once need seven processors of six, so one of them waits."""
    folder = cluster.hosts.shared
    jobs = folder / "jobs"
    jobs.mkdir()
    runs = {"output_dir": str(folder / "runs"), "export": False}
    write_tiny_job(jobs, "two", cluster={"nodes": 2}, **runs)
    write_tiny_job(jobs, "three", cluster={"nodes": 3}, **runs)
    write_tiny_job(jobs, "one", cluster={"nodes": 1, "processes_per_node": 2}, **runs)
    write_tiny_job(jobs, "four", cluster={"nodes": 4, "wait_seconds": 2}, train={"train_batch_size": 16}, **runs)

    to_ray = ("--to", "ray", "--address", cluster.address)
    plainly = ("ray", "job", "submit", "--address", cluster.address, "--working-dir", ".", "--")
    two = cluster.popen("ctl", *plainly, str(BIN / "launcher"), "run", "two.yaml", "train.seed=7", cwd=jobs)
    three = cluster.run(
        "ctl", "launcher", "submit", *to_ray, "--parsable", "jobs/three.yaml", "train.seed=7", cwd=folder
    )
    one = cluster.popen("ctl", "launcher", "submit", *to_ray, "--follow", "one.yaml", "train.seed=7", cwd=jobs)
    four = cluster.popen("ctl", "launcher", "submit", *to_ray, "--follow", "four.yaml", cwd=jobs)

    assert four.wait(300) == 1, four.output
    asked = "asked for 4 nodes with 1 CPU each; nodes in this Ray: 3, large enough: 3"
    assert f"waiting up to 2 s for nodes: {asked}" in four.output
    assert f"after 2 s there are not enough free nodes: {asked}" in " ".join(four.output.split())
    assert only_run(folder, "four").state()["state"] == "failed"

    assert one.wait(300) == 0, one.output
    assert two.wait(300) == 0, two.output
    submitted = three.stdout.strip()
    assert three.stdout == f"{submitted}\n" and "INFO" not in three.stderr
    told = cluster.run("ctl", "ray", "job", "logs", "--follow", "--address", cluster.address, submitted).stdout
    assert "finished after 4 updates" in told
    waited = [
        name
        for name, output in (("one", one.output), ("two", two.output), ("three", told))
        if "waiting up to" in output
    ]
    assert waited
    places = {name: hosts_of_ranks(only_run(folder, name)) for name in ("one", "two", "three")}
    assert len(set(places["one"].values())) == 1 and list(places["one"]) == [0, 1]
    assert list(places["two"].values()) == sorted(set(places["two"].values())) and list(places["two"]) == [0, 1]
    assert places["three"] == {0: "h1", 1: "h2", 2: "h3"}
    begun, ended = zip(*(span(only_run(folder, name)) for name in places if name not in waited), strict=True)
    assert max(begun) < min(ended), "those that did not wait ran side by side"
    assert only_run(folder, "three").state()["ray_job_id"] == submitted
    assert only_run(folder, "two").state()["ray_job_id"] in two.output

    watched = str(only_run(folder, "two").path)
    status = cluster.run("ctl", "launcher", "status", watched).stdout
    assert "finished" in status and all(host in status for host in set(places["two"].values()))
    lines = cluster.run("ctl", "launcher", "logs", watched, "--grep", "rank 1 started").stdout.splitlines()
    assert len(lines) == 1 and places["two"][1] in lines[0]

    found = {name: losses(only_run(folder, name)) for name in places}
    np.testing.assert_allclose(found["two"], found["one"], rtol=2e-5)
    np.testing.assert_allclose(found["three"], found["one"], rtol=2e-5)
    assert len(set(found["one"])) == 4

    assert f"0.0/{3 * CPUS}.0 CPU" in cluster.run("h1", "ray", "status").stdout
    assert ranks_on(cluster.hosts) == []


def test_a_machine_outside_the_run_sees_which_rank_on_the_second_node_raised(cluster: RayCluster) -> None:
    """All commands run on a machine outside the run."""
    folder = cluster.hosts.shared / "watched"
    jobs = folder / "jobs"
    jobs.mkdir(parents=True)
    faulty, runs = write_fault(folder), {"output_dir": str(folder / "runs"), "train": {"max_steps": 100_000}}
    write_tiny_job(jobs, "raising", cluster={"nodes": 2, "env": {"PYTHONPATH": str(faulty)}}, **runs)
    plainly = (
        "ray",
        "job",
        "submit",
        "--address",
        cluster.address,
        "--working-dir",
        ".",
        "--",
        str(BIN / "launcher"),
        "run",
    )
    raising = cluster.popen("ctl", *plainly, "raising.yaml", cwd=jobs)
    raising.wait_for(lambda: any(len(run.metrics()) >= 2 for run in runs_of(folder, "raising")), seconds=240)

    def launcher(verb: str, name: str, *options: str) -> str:
        return cluster.run("ctl", "launcher", verb, name, "--output-dir", "runs", *options, cwd=folder).stdout

    (faulty / "now").touch()
    assert raising.wait() != 0
    places = hosts_of_ranks(only_run(folder, "raising"))
    first = f"rank 1 on node 1 ({places[1]}) failed first, with exit code 1: ValueError: a bad sample on this node"
    for told in (raising.output, launcher("why", "raising")):
        assert first in told
        # Whether the other rank notices by itself, or is ended first, is a matter of how busy the machine is.
        found = re.search(r"1 other rank (?:failed because a peer was lost|ended because the run ended): (.*)", told)
        assert found and found[1].startswith(f"rank 0 on node 0 ({places[0]})"), told
    own = launcher("logs", "raising", "--node", places[1], "--grep", "bad sample")
    assert own and all(line.startswith(f"node-1-{places[1]}/rank-1 ") for line in own.splitlines())
    merged = launcher("logs", "raising")
    assert all(f"node-{node}-{host}/rank-{node} " in merged for node, host in places.items())
    status = json.loads(launcher("status", "raising", "--json"))
    assert (status["state"], status["reason"]) == ("failed", first)
    rows = [(node["host"], node["ranks"], node["ranks_alive"]) for node in status["nodes"]]
    assert rows == [(places[0], [0], 0), (places[1], [1], 0)]


def test_a_submission_that_ray_refuses_is_reported_in_one_line(cluster: RayCluster) -> None:
    folder = cluster.hosts.shared / "refused"
    folder.mkdir()
    job = write_tiny_job(folder, cluster={"nodes": 2})
    submit = ("launcher", "submit", "--to", "ray", "tiny.yaml")
    strange = {"RAY_AUTH_MODE": "disabled"}
    done = cluster.run("ctl", *submit, "--address", cluster.address, cwd=folder, check=False, **strange)
    assert (done.returncode, done.stdout) == (1, "")
    assert "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH" in done.stderr
    done = cluster.run("ctl", *submit, "--address", "http://h2:8265", cwd=folder, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: no Ray answers at http://h2:8265: ")
    done = cluster.run("ctl", *submit, cwd=folder, check=False)
    assert done.returncode == 2 and "--address http://HEAD:8265" in done.stderr
    done = cluster.run("ctl", *submit, "--dry-run", cwd=folder, RAY_API_SERVER_ADDRESS=cluster.address)
    assert yaml.safe_load(done.stdout)["entrypoint"].endswith(" launcher run tiny.yaml")
    secret = Path(cluster.secret["RAY_AUTH_TOKEN_PATH"]).read_text()
    assert secret not in done.stdout and not runs_of(folder) and job.exists()


def test_ray_leaves_out_what_the_request_excludes(tmp_path: Path) -> None:
    """A request's patterns, applied by Ray's own packing."""
    from ray._private.runtime_env.packaging import create_package

    from launcher.job import load_job
    from launcher.ray_jobs import ray_request

    job = write_tiny_job(tmp_path, output_dir=str(tmp_path / "out" / "ru*ns"))
    for name in ("out/ru*ns/a/plan.json", "out/rubens/kept.txt", "ds/out/ru*ns/kept.json"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(json.dumps(name))
    request = ray_request(load_job(job).job, job, [], "http://head:8265", tmp_path)
    package = tmp_path.parent / f"{tmp_path.name}.zip"
    create_package(request.working_dir, package, include_gitignore=True, excludes=list(request.excludes))
    with zipfile.ZipFile(package) as packed:
        names = {name for name in packed.namelist() if not name.endswith("/")}
    assert names == {"tiny.yaml", "out/rubens/kept.txt", "ds/out/ru*ns/kept.json"}
