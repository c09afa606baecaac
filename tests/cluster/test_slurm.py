"""Runs inside real Slurm allocations: the same losses as on one node, side by side, and what is left behind."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from launcher.run_dir import RunDir
from tests.cluster import hosts as several
from tests.cluster import slurm as over_hosts
from tests.cluster.conftest import need
from tests.cluster.hosts import Hosts, several_hosts
from tests.cluster.jobs import BIN, PATIENT, hosts_of_ranks, losses, runs_of, write_tiny_job
from tests.cluster.slurm import Slurm

pytestmark = pytest.mark.cluster

REPOSITORY = Path(__file__).parents[2]
TEMPLATE = REPOSITORY / "slurm" / "finetune.sbatch"
WITH_LAUNCHER = {**PATIENT, "PATH": f"{BIN}:{os.environ['PATH']}"}


RAISES_ON_RANK_1 = """
import os

if os.environ.get("RANK") == "1":
    from launcher.worker import train

    def advance(*_):
        raise ValueError("a bad sample on this node")

    train.Training.advance = advance
"""


def sbatch(hosts: Hosts, job_file: Path, *options: str, overrides: tuple[str, ...] = (), **environment: str) -> str:
    """Submits a job file with the template as it is; the Slurm job's id."""
    command = ["sbatch", "--parsable", "--cpus-per-task=2", *options, str(TEMPLATE), job_file.name, *overrides]
    return hosts.run("ctl", command, cwd=job_file.parent, **{**WITH_LAUNCHER, **environment}).stdout.strip()


def launcher(hosts: Hosts, *arguments: str) -> str:
    """What the launcher prints on the login node."""
    return hosts.run("ctl", [str(BIN / "launcher"), *arguments], **WITH_LAUNCHER).stdout


def wait_for(condition: Callable[[], bool], told: Callable[[], str], seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, told()
        time.sleep(0.1)


def how_it_stands(hosts: Hosts, folder: Path, job: str) -> str:
    """What Slurm says of a job, and what the job printed so far."""
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
        time.sleep(0.2)


def of_launcher(hosts: Hosts) -> list[str]:
    """What of a run still lives on any host."""
    words = ("ray", "raylet", "gcs_server", "launcher")
    found = []
    for host in hosts.names:
        for process in hosts.processes(host):
            line = " ".join(process.cmdline())
            if any(word in line for word in words):
                found.append(f"{host}: {line[:120]}")
    return found


def test_two_and_three_nodes_at_once_learn_what_one_node_does(slurm: Slurm, shared: Path) -> None:
    hosts = slurm.hosts
    one = sbatch(hosts, write_tiny_job(shared, "one"), "--nodes=1", overrides=("cluster.nodes=1",))
    assert ended(hosts, shared, one)[0] == "COMPLETED 0:0", ended(hosts, shared, one)
    two = sbatch(hosts, write_tiny_job(shared, "two"), "--nodes=2")
    three = sbatch(hosts, write_tiny_job(shared, "three"), "--nodes=3")
    states = {job: ended(hosts, shared, job) for job in (two, three)}
    assert [state for state, _ in states.values()] == ["COMPLETED 0:0"] * 2, states

    (run_one,), (run_two,), (run_three,) = (runs_of(shared, name) for name in ("one", "two", "three"))
    assert run_two.path.name == f"two-slurm-{two}"
    assert hosts_of_ranks(run_two) == {0: "h1", 1: "h2"}
    assert hosts_of_ranks(run_three) == {0: "h1", 1: "h2", 2: "h3"}
    assert len(losses(run_one)) == 4
    for run in (run_two, run_three):
        np.testing.assert_allclose(losses(run), losses(run_one), rtol=2e-5)
        nodes = [event for event in run.events() if event["event"] == "node"]
        assert [(node["host"], node["interface"]) for node in nodes] == [
            (host, "eth0") for host in ("h1", "h2", "h3")[: len(nodes)]
        ]
        assert run.state()["state"] == "finished" and run.state()["slurm_job_id"] in (two, three)
        assert not run.cluster.exists()
    assert of_launcher(hosts) == []
    for host in hosts.names:
        left = hosts.run(host, ["ls", "/tmp"]).stdout.split()
        assert [name for name in left if name.startswith("lr-")] == []


def test_a_rank_that_raises_on_the_second_node_is_told_from_a_login_node(slurm: Slurm, shared: Path) -> None:
    hosts = slurm.hosts
    faulty = shared / "faulty"
    faulty.mkdir()
    (faulty / "sitecustomize.py").write_text(RAISES_ON_RANK_1)
    job_file = write_tiny_job(shared, cluster={"env": {"PYTHONPATH": str(faulty)}}, data={"cache_dir": "/tmp/cache"})
    job = sbatch(hosts, job_file, "--nodes=2")
    state, output = ended(hosts, shared, job)
    assert state == "FAILED 1:0", output
    # Nothing of the cache is shared, so both hosts tokenised.
    assert "tokenising on h2 too" in output
    assert [hosts.run(host, ["ls", "/tmp/cache"]).stdout.split() for host in ("h1", "h2")] == [["data", "models"]] * 2

    (run,) = runs_of(shared)
    for told in (output, launcher(hosts, "why", str(run.path))):
        assert "rank 1 on node 1 (h2)" in told
        assert "ValueError: a bad sample on this node" in told
    logs = launcher(hosts, "logs", str(run.path))
    assert "a bad sample on this node" in logs and "rank 0" in logs
    own = launcher(hosts, "logs", str(run.path), "--node", "h2", "--grep", "ValueError")
    assert own.count("a bad sample") >= 1 and "rank 0" not in own
    status = launcher(hosts, "status", str(run.path))
    assert "failed" in status and "h1" in status and "h2" in status
    assert of_launcher(hosts) == []


def test_a_run_is_cancelled_from_a_login_node_and_requeued_goes_on(slurm: Slurm, shared: Path) -> None:
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

    hosts.run("ctl", ["scontrol", "requeue", job])
    # Slurm would wait two minutes before it starts a requeued job. In the very second in which it ended, a node refuses
    # to launch it again ("Job credential revoked").
    hosts.run("ctl", ["scontrol", "update", f"JobId={job}", "StartTime=now+2"])
    wait_for(lambda: len(run.metrics()) >= made + 2, lambda: how_it_stands(hosts, shared, job))
    # The signal that comes before the time limit: to the batch script alone.
    hosts.run("ctl", ["scancel", "--batch", "--signal=USR1", job])
    state, output = ended(hosts, shared, job)
    assert f"going on after update {made}" in output
    assert run.complete_checkpoints()[-1] == len(run.metrics()) > made
    assert [line["update"] for line in run.metrics()] == list(range(len(run.metrics())))
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


def test_the_interface_that_reaches_the_others_is_found() -> None:
    need(several.missing() or over_hosts.missing())
    with several_hosts(2, dead_interface=True, dead_name=True, dead_route=True) as hosts:
        Slurm(hosts).start()
        job_file = write_tiny_job(hosts.shared)
        # Another version on the second host, as a forgotten environment would have it.
        other = hosts.shared / "other" / "transformers-4.0.0.dist-info"
        other.mkdir(parents=True)
        (other / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 4.0.0\n")
        wrapper = hosts.shared / "doctor"
        wrapper.write_text(
            f'#!/bin/sh\n[ $(hostname) = h2 ] && [ "$1" = other ] && export PYTHONPATH={other.parent}\n'
            f"exec {BIN}/launcher node --doctor {job_file}\n"
        )
        wrapper.chmod(0o755)
        command = ["srun", "--nodes=2", "--cpus-per-task=2", str(wrapper)]
        good = hosts.run("ctl", command, seconds=240, **WITH_LAUNCHER)
        assert "every node will do" in good.stdout
        assert good.stdout.count("eth0") == 2 and "dead0" not in good.stdout
        bad = hosts.run("ctl", [*command, "other"], seconds=240, check=False, **WITH_LAUNCHER)
        assert bad.returncode == 1
        assert "node 1 (h2): transformers 4.0.0, and" in bad.stderr
        assert "will not do" in bad.stdout
        assert [path.name for path in (hosts.shared / "runs").iterdir() if path.name.startswith(".doctor")] == []


def test_a_script_of_the_users_own_runs_on_two_nodes(slurm: Slurm, shared: Path) -> None:
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
    number = sbatch(hosts, job_file, "--nodes=2", overrides=("--", str(script), "--report"))
    state, output = ended(hosts, shared, number)
    assert state == "COMPLETED 0:0", output
    (run,) = runs_of(shared, "script")
    assert hosts_of_ranks(run) == {0: "h1", 1: "h2"}
    assert [line["update"] for line in run.metrics()] == list(range(10))
    for host in ("h1", "h2"):
        own = launcher(hosts, "logs", str(run.path), "--node", host)
        assert "the ranks agree" in own and f"'MASTER_ADDR': '{hosts.address('h1')}'" in own
