"""A task's allocation from Slurm's variables."""

from __future__ import annotations

import pytest

from launcher.errors import RequestError
from launcher.runs.slurm_node import _allocation_overrides, _check_allocation, _nodes_of_resume
from launcher.slurm.allocation import expand_hosts, read_allocation, run_stamp
from tests.unit.inputs import job_of, machine_facts, plan_of

TASK = {
    "SLURM_JOB_ID": "77",
    "SLURM_NODEID": "1",
    "SLURM_JOB_NODELIST": "gpu[01-03]",
    "SLURM_NTASKS": "3",
    "SLURM_LOCALID": "0",
    "SLURM_CPUS_ON_NODE": "64",
    "SLURM_GPUS_ON_NODE": "8",
}


@pytest.mark.parametrize(
    ("listed", "hosts"),
    [
        ("login", ("login",)),
        ("a,b", ("a", "b")),
        ("gpu[01-03,7],login", ("gpu01", "gpu02", "gpu03", "gpu7", "login")),
        ("n[098-101]", ("n098", "n099", "n100", "n101")),
        ("r[1-2]n[1-2]", ("r1n1", "r1n2", "r2n1", "r2n2")),
        ("h[3,1]-ib", ("h3-ib", "h1-ib")),
    ],
)
def test_hosts_are_expanded_in_order(listed: str, hosts: tuple[str, ...]) -> None:
    assert expand_hosts(listed) == hosts


def test_the_allocation_of_a_task() -> None:
    allocation = read_allocation(TASK)
    assert (allocation.node, allocation.nodes, allocation.cpus, allocation.gpus) == (1, 3, 64, 8)
    assert allocation.hosts == ("gpu01", "gpu02", "gpu03")
    assert (allocation.stamp, allocation.restart) == ("slurm-77", 0)
    assert read_allocation({**TASK, "SLURM_CPUS_PER_TASK": "16", "SLURM_RESTART_COUNT": "2"}).restart == 2
    assert read_allocation({**TASK, "SLURM_CPUS_PER_TASK": "16"}).cpus == 16
    # A step may have fewer nodes than its job.
    assert read_allocation({**TASK, "SLURM_STEP_NODELIST": "gpu[02-04]"}).hosts == ("gpu02", "gpu03", "gpu04")


def test_each_job_of_an_array_has_its_own_stamp() -> None:
    array = {"SLURM_JOB_ID": "78", "SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "4"}
    assert run_stamp(array) == "slurm-77_4"


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({}, ("not inside a Slurm job", "launcher submit")),
        ({"SLURM_JOB_ID": "77"}, ("not a task of srun", "srun launcher node")),
        ({**TASK, "SLURM_NTASKS": "24"}, ("24 tasks on 3 nodes", "--ntasks-per-node=1")),
        ({**TASK, "SLURM_LOCALID": "1"}, ("3 tasks on 3 nodes", "--ntasks-per-node=1")),
    ],
)
def test_other_processes_than_one_task_per_node_are_rejected(
    environment: dict[str, str], words: tuple[str, ...]
) -> None:
    with pytest.raises(RequestError) as refused:
        read_allocation(environment)
    assert all(word in str(refused.value) for word in words)


@pytest.mark.parametrize(
    ("cluster", "given", "words"),
    [
        ({"nodes": 2}, {}, ("asks for 2 nodes, but Slurm allocated 3", "--nodes=2")),
        ({"nodes": 3, "spare_nodes": 2}, {}, ("3 nodes and 2 spare nodes, but Slurm allocated 3", "--nodes=5")),
        (
            {},
            {"SLURM_GPUS_ON_NODE": "4"},
            ("Slurm allocated 4 GPUs on this node, but 8 are visible", "--gpus-per-node=8"),
        ),
        (
            {"gpus_per_node": 4},
            {"SLURM_GPUS_ON_NODE": "2"},
            ("4 GPUs per node, but Slurm allocated 2", "--gpus-per-node=4"),
        ),
        ({}, {"SLURM_CPUS_PER_TASK": "4"}, ("8 ranks per node, but Slurm allocated 4", "--cpus-per-task=8")),
        ({"gpus_per_node": 0, "processes_per_node": 80}, {}, ("80 ranks per node, but Slurm allocated 64",)),
        ({"address": "head:6379"}, {}, ("head:6379", "leave it out")),
    ],
)
def test_a_job_that_needs_more_than_the_allocation_is_rejected(
    cluster: dict, given: dict[str, str], words: tuple[str, ...]
) -> None:
    job = job_of(cluster={"nodes": 3, **cluster})
    with pytest.raises(RequestError) as refused:
        _check_allocation(job, read_allocation({**TASK, **given}), machine_facts(gpus=8))
    assert all(word in str(refused.value) for word in words), refused.value


@pytest.mark.parametrize(
    ("cluster", "overrides"),
    [
        ({}, ["cluster.nodes=3"]),
        ({"nodes": 2}, []),
        ({"spare_nodes": 1}, ["cluster.nodes=2"]),
        # `launcher node` starts Ray on all nodes of the job.
        ({"nodes": 3, "address": "local"}, ["cluster.address=auto"]),
    ],
)
def test_the_allocation_sets_what_the_job_leaves_open(cluster: dict, overrides: list[str]) -> None:
    assert list(_allocation_overrides(read_allocation(TASK), job_of(cluster=cluster))) == overrides


@pytest.mark.parametrize(
    ("cluster", "given", "overrides"),
    [
        ({"nodes": 3}, (), []),
        ({"nodes": 2, "spare_nodes": 1}, (), []),
        ({"nodes": 4}, (), ["cluster.nodes=3"]),
        ({"nodes": 1, "spare_nodes": 1}, (), ["cluster.nodes=2"]),
        # With fewer nodes than before, those with ranks come first.
        ({"nodes": 3, "spare_nodes": 1}, (), ["cluster.spare_nodes=0"]),
        ({"nodes": 4, "spare_nodes": 2}, (), ["cluster.nodes=3", "cluster.spare_nodes=0"]),
        ({"nodes": 4}, ("cluster.nodes=2",), []),
        ({"nodes": 4}, ("cluster.spare_nodes=1",), []),
    ],
)
def test_a_resumed_run_uses_the_nodes_of_the_allocation(
    cluster: dict, given: tuple[str, ...], overrides: list[str]
) -> None:
    before = plan_of(job_of(cluster={**cluster, "gpus_per_node": 8}, train={"train_batch_size": "auto"}))
    assert _nodes_of_resume(before, given, read_allocation(TASK)) == overrides


def test_each_call_of_srun_has_its_own_id() -> None:
    first = read_allocation({**TASK, "SLURM_STEP_ID": "0"}).start
    again = [{"SLURM_STEP_ID": "1"}, {"SLURM_STEP_ID": "0", "SLURM_RESTART_COUNT": "1"}, {"SLURM_JOB_ID": "78"}]
    assert len({first, *(read_allocation({**TASK, **more}).start for more in again)}) == 4
