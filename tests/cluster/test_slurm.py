"""Runs inside real Slurm allocations: the losses of one node, runs side by side, and cleaning up."""

from __future__ import annotations

import json
import os
import re
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from launcher.run_dir import RunDir
from tests.cluster import hosts as several
from tests.cluster import slurm as over_hosts
from tests.cluster.conftest import need
from tests.cluster.hosts import CPU_ONLY, Hosts, several_hosts
from tests.cluster.slurm import Slurm
from tests.cluster.tiny_jobs import BIN, hosts_of_ranks, losses, runs_of, write_fault, write_tiny_job

pytestmark = pytest.mark.cluster

REPOSITORY = Path(__file__).parents[2]
TEMPLATE = REPOSITORY / "slurm" / "finetune.sbatch"
WITH_LAUNCHER = {**CPU_ONLY, "PATH": f"{BIN}:{os.environ['PATH']}"}


def sbatch(
    hosts: Hosts,
    job_file: Path,
    *options: str,
    overrides: tuple[str, ...] = (),
    fresh: bool = False,
    **environment: str,
) -> str:
    """Submits a job file with the template as it is; the Slurm job's id.

    The ranks are forks and so no children of the job's tasks, whose signals they would get, unless they are `fresh`.
    """
    forking = {} if fresh else hosts.start_fork_servers()
    command = ["sbatch", "--parsable", "--cpus-per-task=2", *options, str(TEMPLATE), job_file.name, *overrides]
    given = {**WITH_LAUNCHER, **forking, **environment}
    return hosts.run("ctl", command, cwd=job_file.parent, **given).stdout.strip()


def launcher(hosts: Hosts, *arguments: str) -> str:
    """What the launcher prints on the login node."""
    return hosts.run("ctl", [str(BIN / "launcher"), *arguments], **WITH_LAUNCHER).stdout


def wait_for(condition: Callable[[], bool], told: Callable[[], str], seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, told()
        time.sleep(0.1)


def how_it_stands(hosts: Hosts, folder: Path, job: str) -> str:
    """Slurm's record of a job, and what the job has printed so far."""
    printed = [path.read_text() for path in folder.glob(f"*-{job}.log")]
    return "\n".join([hosts.run("ctl", ["scontrol", "show", "job", job]).stdout, *printed])


def ended(hosts: Hosts, folder: Path, job: str, seconds: float = 240.0) -> tuple[str, str]:
    """A job's state and exit status once it has ended, and what it printed."""
    deadline = time.monotonic() + seconds
    while True:
        shown = hosts.run("ctl", ["scontrol", "show", "job", job]).stdout
        facts = dict(word.split("=", 1) for word in shown.split() if "=" in word)
        log = folder / f"{facts['JobName']}-{job}.log"
        output = log.read_text() if log.exists() else ""
        if facts["JobState"] not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING"):
            return f"{facts['JobState']} {facts['ExitCode']}", output
        assert time.monotonic() < deadline, f"{shown}\n{output}"
        time.sleep(0.3)


def of_launcher(hosts: Hosts) -> list[str]:
    """Processes of runs that still live on any host."""
    words = ("ray", "raylet", "gcs_server", "launcher")
    found = []
    for host in hosts.names:
        found += [f"{host}: a forked rank, process {fork.pid}" for fork in hosts.forks(host)]
        for line in map(" ".join, hosts.command_lines(host)):
            if any(word in line for word in words):
                found.append(f"{host}: {line[:120]}")
    return found


def span(run: RunDir) -> tuple[str, str]:
    """When a run had its nodes: from starting ranks to its end."""
    times = {event["state"]: event["time"] for event in run.events() if event["event"] == "state"}
    return times["starting"], times["finished"]


def dashboards_beyond_loopback(hosts: Hosts, host: str, count: int) -> list[str]:
    """Addresses at which the host's dashboards, `count` of them, listen for other machines."""
    lines = [" ".join(line) for line in hosts.command_lines(host)]
    ports = re.findall(r"dashboard\.py --host=127\.0\.0\.1 --port=([0-9]+) ", "\n".join(lines))
    assert len(ports) == count
    listening = hosts.run(host, ["ss", "--tcp", "--listening", "--numeric", "--no-header"]).stdout
    places = [line.split()[3] for line in listening.splitlines()]
    assert places
    return [
        place for place in places if place.endswith(tuple(f":{port}" for port in ports)) and "127.0.0.1" not in place
    ]


def looked_into(hosts: Hosts, folder: Path, **jobs: str) -> list[str]:
    """The address of each job's own Ray, once all of them are starting ranks.

    Their keys are for one user, their dashboards for one machine, and the first has two GPUs of two nodes each.
    """
    runs = [RunDir(folder / "runs" / f"{name}-slurm-{job}") for name, job in jobs.items()]
    wait_for(
        lambda: all(run.state().get("state") in ("starting", "training") for run in runs),
        lambda: "\n".join(how_it_stands(hosts, folder, job) for job in jobs.values()),
    )
    # First, since the runs are short. The monitor would kill the agent when ZeRO offloads much.
    monitors = hosts.run(
        "h1", ["sh", "-c", "grep -h 'MemoryMonitor' /tmp/lr-*/r/session_latest/logs/raylet.out"]
    ).stdout
    assert [" disabled." in line for line in monitors.splitlines()] == [True] * len(runs)
    addresses = []
    for run in runs:
        assert stat.S_IMODE((run.cluster / "key").stat().st_mode) == 0o600
        found = re.search(r"--address='([0-9.]+:[0-9]+)'", (run.logs / "node-0-h1" / "node.log").read_text())
        assert found
        addresses.append(found[1])
    assert dashboards_beyond_loopback(hosts, "h1", len(runs)) == []
    secret = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(runs[0].cluster / "key")}
    # Ray's own clients, since `ray status` shows what the autoscaler saw up to five seconds ago.
    count = "import ray; ray.init(logging_level='ERROR'); print(ray.cluster_resources()['GPU'])"
    told = hosts.run("h1", [str(BIN / "python"), "-c", count], RAY_ADDRESS=addresses[0], **secret).stdout
    assert told.split() == ["4.0"], told
    return addresses


def test_two_and_three_nodes_at_once_have_the_losses_of_one_node(slurm: Slurm, shared: Path) -> None:
    hosts = slurm.hosts
    one = sbatch(hosts, write_tiny_job(shared, "one"), "--nodes=1", overrides=("cluster.nodes=1",))
    assert ended(hosts, shared, one)[0] == "COMPLETED 0:0", ended(hosts, shared, one)
    two = sbatch(hosts, write_tiny_job(shared, "two"), "--nodes=2", "--gres=gpu:2")
    three = sbatch(hosts, write_tiny_job(shared, "three"), "--nodes=3")
    addresses = looked_into(hosts, shared, two=two, three=three)
    assert len(set(addresses)) == 2 and all(address.startswith(hosts.address("h1")) for address in addresses)
    states = {job: ended(hosts, shared, job) for job in (two, three)}
    assert [state for state, _ in states.values()] == ["COMPLETED 0:0"] * 2, states

    (run_one,), (run_two,), (run_three,) = (runs_of(shared, name) for name in ("one", "two", "three"))
    assert run_two.path.name == f"two-slurm-{two}"
    assert hosts_of_ranks(run_two) == {0: "h1", 1: "h2"}
    assert hosts_of_ranks(run_three) == {0: "h1", 1: "h2", 2: "h3"}
    assert len(losses(run_one)) == 4
    for run, job, names in ((run_two, two, ("h1", "h2")), (run_three, three, ("h1", "h2", "h3"))):
        np.testing.assert_allclose(losses(run), losses(run_one), rtol=2e-5)
        nodes = [event for event in run.events() if event["event"] == "node"]
        assert [(node["host"], node["interface"]) for node in nodes] == [(name, "eth0") for name in names]
        assert run.state()["state"] == "finished" and run.state()["slurm_job_id"] == job
        assert not run.cluster.exists()
    begun, over = zip(*(span(run) for run in (run_two, run_three)), strict=True)
    assert max(begun) < min(over), "they ran side by side"
    assert [path.name for path in (shared / "runs").iterdir() if path.name.endswith(".startup-errors")] == []
    assert of_launcher(hosts) == []
    for host in hosts.names:
        left = hosts.run(host, ["ls", "/tmp"]).stdout.split()
        assert [name for name in left if name.startswith("lr-")] == []


def test_a_login_node_sees_which_rank_on_the_second_node_raised(slurm: Slurm, shared: Path) -> None:
    hosts = slurm.hosts
    faulty = write_fault(shared)
    changes = {"cluster": {"env": {"PYTHONPATH": str(faulty)}}, "train": {"max_steps": 100_000}}
    job_file = write_tiny_job(shared, data={"cache_dir": "/tmp/cache"}, **changes)
    job = sbatch(hosts, job_file, "--nodes=2")
    path = shared / "runs" / f"tiny-slurm-{job}"

    def live() -> dict[str, Any]:
        return json.loads(launcher(hosts, "status", str(path), "--json"))

    wait_for(lambda: len(RunDir(path).metrics()) >= 2, lambda: how_it_stands(hosts, shared, job))
    # Heartbeats come every five seconds.
    wait_for(lambda: all((node["updates"] or 0) >= 1 for node in live()["nodes"]), lambda: str(live()))
    status = live()
    assert (status["state"], status["slurm_job_id"], status["compared"]) == ("training", job, "own_seconds")
    rows = [(node["node_rank"], node["host"], node["ranks"], node["ranks_alive"]) for node in status["nodes"]]
    assert rows == [(0, "h1", [0], 1), (1, "h2", [1], 1)]
    (faulty / "now").touch()
    state, output = ended(hosts, shared, job)
    assert state == "FAILED 1:0", output
    # Nothing of the cache is shared, so both hosts tokenised.
    assert "tokenising on h2 too" in output
    caches = [hosts.run(host, ["ls", "/tmp/cache"]).stdout.split() for host in ("h1", "h2")]
    assert caches == [["data", "models", "uses"], ["data", "models"]]

    (run,) = runs_of(shared)
    first = "rank 1 on node 1 (h2) failed first, with exit code 1: ValueError: a bad sample on this node"
    for told in (output, launcher(hosts, "why", str(run.path))):
        assert first in told
        assert "1 other rank failed because a peer was lost: rank 0 on node 0 (h1)" in told
    logs = launcher(hosts, "logs", str(run.path))
    assert "a bad sample on this node" in logs and "rank 0" in logs
    own = launcher(hosts, "logs", str(run.path), "--node", "h2", "--grep", "ValueError")
    assert own.count("a bad sample") >= 1 and "rank 0" not in own
    status = live()
    assert status["state"] == "failed" and status["reason"] == first, run.events()[-3:]
    rows = [(node["host"], node["ranks"], node["ranks_alive"], node["ended"]) for node in status["nodes"]]
    assert rows == [("h1", [0], 0, True), ("h2", [1], 0, True)]
    assert status["nodes"][1]["exit_codes"] == [1] and status["nodes"][0]["exit_codes"] != []
    assert all(node["updates"] in (status["updates"] - 1, status["updates"]) for node in status["nodes"])
    assert of_launcher(hosts) == []


def test_a_run_is_cancelled_from_a_login_node_and_resumes_when_requeued(slurm: Slurm, shared: Path) -> None:
    hosts = slurm.hosts
    job_file = write_tiny_job(shared, train={"max_steps": 100_000})
    job = sbatch(hosts, job_file, "--nodes=2")
    path = shared / "runs" / f"tiny-slurm-{job}"
    wait_for(lambda: len(RunDir(path).metrics()) >= 2, lambda: how_it_stands(hosts, shared, job))
    assert "training" in launcher(hosts, "status", str(path))
    assert "stopped" in launcher(hosts, "cancel", str(path))
    state, output = ended(hosts, shared, job)
    assert state == "FAILED 143:0", output
    run = RunDir(path)
    made = len(run.metrics())
    assert run.state()["state"] == "stopped" and run.complete_checkpoints() == [made]
    assert "cancelled by" in output

    # Requeued, then cancelled before it starts: Slurm would wait two minutes.
    hosts.run("ctl", ["scontrol", "requeue", job])
    assert f"cancelled its Slurm job {job}, which was requeued" in launcher(hosts, "cancel", str(path))
    assert ended(hosts, shared, job)[0].startswith("CANCELLED")
    hosts.run("ctl", ["scontrol", "requeue", job])
    # Slurm would wait two minutes before it starts a requeued job. In the very second in which it ended, a node refuses
    # to launch it again ("Job credential revoked").
    hosts.run("ctl", ["scontrol", "update", f"JobId={job}", "StartTime=now+2"])
    wait_for(lambda: len(run.metrics()) >= made + 2, lambda: how_it_stands(hosts, shared, job))
    # The signal that comes before the time limit: to the batch script alone.
    hosts.run("ctl", ["scancel", "--batch", "--signal=USR1", job])
    state, output = ended(hosts, shared, job)
    assert f"resuming after update {made}" in output
    made = len(run.metrics())
    assert run.complete_checkpoints()[-1] == made
    assert f"sbatch SCRIPT --resume {path}" in " ".join(output.split())

    # The allocation after that has one node.
    command = ["sbatch", "--parsable", "--cpus-per-task=2", "--nodes=1", str(TEMPLATE), "--resume", str(path)]
    job = hosts.run("ctl", [*command, f"train.max_steps={made + 2}"], cwd=shared, **WITH_LAUNCHER).stdout.strip()
    state, output = ended(hosts, shared, job)
    assert state == "COMPLETED 0:0", output
    assert "2 → 1 ranks: train_batch_size stays 12" in output
    assert [line["update"] for line in run.metrics()] == list(range(made + 2))
    assert [line["samples"] for line in run.metrics()] == [12 * (update + 1) for update in range(made + 2)]
    assert run.state()["slurm_job_id"] == job and set(hosts_of_ranks(run)) == {0, 1}
    assert of_launcher(hosts) == []


def test_a_node_that_does_not_come_up_is_named_with_the_end_of_its_log(slurm: Slurm, shared: Path) -> None:
    hosts = slurm.hosts
    (shared / "broken" / "ray").mkdir(parents=True)
    (shared / "broken" / "ray" / "__init__.py").write_text("raise ImportError('libstdc++ is too old here')")
    (shared / "bin").mkdir()
    wrapper = shared / "bin" / "launcher"
    wrapper.write_text(
        f'#!/bin/sh\n[ $(hostname) = h2 ] && export PYTHONPATH={shared}/broken\nexec {BIN}/launcher "$@"\n'
    )
    wrapper.chmod(0o755)
    job_file = write_tiny_job(shared)
    job = sbatch(hosts, job_file, "--nodes=2", PATH=f"{wrapper.parent}:{os.environ['PATH']}")
    state, output = ended(hosts, shared, job)
    assert state == "FAILED 1:0", output
    assert "node 1 (h2) did not come up" in output
    assert "libstdc++ is too old here" in output
    assert runs_of(shared)[0].state()["state"] == "failed"
    assert of_launcher(hosts) == []


def test_a_node_that_refuses_the_job_ends_it_at_once(slurm: Slurm, shared: Path) -> None:
    """One node does not see the model: the other ends too, without waiting ten minutes for it."""
    hosts = slurm.hosts
    (shared / "bin").mkdir()
    wrapper = shared / "bin" / "launcher"
    blind = '[ $(hostname) = "$BLIND" ] && set -- "$@" model.name_or_path=/nowhere/model'
    wrapper.write_text(f'#!/bin/sh\n{blind}\nexec {BIN}/launcher "$@"\n')
    wrapper.chmod(0o755)
    job_file = write_tiny_job(shared)
    for node, host in enumerate(("h1", "h2")):
        job = sbatch(hosts, job_file, "--nodes=2", PATH=f"{wrapper.parent}:{os.environ['PATH']}", BLIND=host)
        state, output = ended(hosts, shared, job)
        assert state == "FAILED 2:0", output
        assert f"node {node} ({host}) failed to start: " in output
        assert output.count("folder not found: /nowhere/model") == 2, "each side says why it ends"
    assert [path.name for path in (shared / "runs").iterdir() if path.name.startswith(".")] == []
    assert of_launcher(hosts) == []


def test_the_interface_that_reaches_the_other_nodes_is_found() -> None:
    need(several.missing() or over_hosts.missing())
    with several_hosts(2, dead_interface=True, dead_name=True, dead_route=True) as hosts:
        Slurm(hosts).start()
        job_file = write_tiny_job(hosts.shared)
        # Another version on the second host, as in an outdated environment.
        other = hosts.shared / "other" / "transformers-4.0.0.dist-info"
        other.mkdir(parents=True)
        (other / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 4.0.0\n")
        wrapper = hosts.shared / "doctor"
        wrapper.write_text(
            f'#!/bin/sh\n[ $(hostname) = h2 ] && [ "$1" = other ] && export PYTHONPATH={other.parent}\n'
            f"exec {BIN}/launcher node --doctor {job_file}\n"
        )
        wrapper.chmod(0o755)
        # Left behind by one that was killed in the same allocation, which will be the first here.
        left = RunDir(hosts.shared / "runs" / ".doctor-slurm-1")
        left.cluster.mkdir(parents=True)
        command = ["srun", "--nodes=2", "--cpus-per-task=2", str(wrapper)]
        good = hosts.run("ctl", command, seconds=240, **WITH_LAUNCHER)
        assert "all nodes passed" in good.stdout and not left.path.exists()
        assert good.stdout.count("eth0") == 2 and "dead0" not in good.stdout
        bad = hosts.run("ctl", [*command, "other"], seconds=240, check=False, **WITH_LAUNCHER)
        assert bad.returncode == 1
        assert "node 1 (h2): transformers 4.0.0, but" in bad.stderr
        assert "unfit" in bad.stdout
        assert [path.name for path in (hosts.shared / "runs").iterdir() if path.name.startswith(".doctor")] == []


def test_a_users_script_runs_on_two_nodes_and_resumes_when_requeued(slurm: Slurm, shared: Path) -> None:
    hosts = slurm.hosts
    job_file = shared / "script.yaml"
    job = {
        "train": {"max_steps": 10, "train_micro_batch_size_per_gpu": 16},
        "schedule": {"peak_lr": 0.05},
        "cluster": {"gpus_per_node": 0, "processes_per_node": 1},
        "output_dir": str(shared / "runs"),
    }
    job_file.write_text(yaml.safe_dump(job))
    script = REPOSITORY / "tests" / "local" / "scripts" / "plain_ddp.py"
    number = sbatch(
        hosts, job_file, "--nodes=2", overrides=("--", str(script), "--report", "--saved", "{run_dir}/saved")
    )
    state, output = ended(hosts, shared, number)
    assert state == "COMPLETED 0:0", output
    (run,) = runs_of(shared, "script")
    assert hosts_of_ranks(run) == {0: "h1", 1: "h2"}
    assert [line["update"] for line in run.metrics()] == list(range(10))
    for host in ("h1", "h2"):
        own = launcher(hosts, "logs", str(run.path), "--node", host)
        assert "the ranks agree" in own and f"'MASTER_ADDR': '{hosts.address('h1')}'" in own

    before = run.metrics()
    hosts.run("ctl", ["scontrol", "requeue", number])
    hosts.run("ctl", ["scontrol", "update", f"JobId={number}", "StartTime=now+2"])
    state, output = ended(hosts, shared, number)
    assert state == "COMPLETED 0:0", output
    assert runs_of(shared, "script") == [run]
    assert "running the script again" in output
    assert "True, 1 restarts" in launcher(hosts, "logs", str(run.path), "--node", "h2")
    # It resumed from what it had saved, and kept what it had reported until then.
    assert [line["update"] for line in run.metrics()] == list(range(10))
    assert run.metrics()[:6] == before[:6] and all(new["time"] > before[-1]["time"] for new in run.metrics()[6:])
