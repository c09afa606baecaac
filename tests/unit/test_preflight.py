"""What is held against a node before ranks are started on it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from launcher.errors import RunFailed
from launcher.fleet.environment import rank_environment
from launcher.fleet.examine import NodeFacts
from launcher.fleet.nodes import Node
from launcher.fleet.preflight import NodeCheck, Wanted, machine_notes, machine_problems, refuse
from launcher.plan.model import World

VERSIONS = {"launcher": "0.1", "torch": "2.13.0", "deepspeed": "0.19.8", "transformers": "5.23.0", "ray": "2.60.0"}
GPUS = World(nodes=2, processes_per_node=8, device="cuda", backend="nccl", threads_per_process=8)
WANTED = Wanted(GPUS, VERSIONS, 100 * 1024**3, {}, {})
NODE = Node(None, "h2", "10.0.0.2", tuple("01234567"), "ib0")
FACTS = NodeFacts(VERSIONS, 8, "NVIDIA H100", 500 * 1024**3, None)


def test_a_good_node_has_neither_problems_nor_notes() -> None:
    assert machine_problems(FACTS, WANTED, NODE) == []
    assert machine_notes(FACTS, WANTED, NODE) == []


@pytest.mark.parametrize("package", ["launcher", "torch", "deepspeed", "transformers"])
def test_another_version_is_a_problem(package: str) -> None:
    (problem,) = machine_problems(replace(FACTS, versions={**VERSIONS, package: "missing"}), WANTED, NODE)
    assert problem == f"{package} missing, and {VERSIONS[package]} where the run was planned: install the same there"


def test_a_lost_gpu_is_a_problem_where_gpus_are_used() -> None:
    facts = replace(FACTS, gpus=7)
    (problem,) = machine_problems(facts, WANTED, NODE)
    assert "7 GPUs seen of the 8" in problem and "nvidia-smi" in problem
    cpus = replace(WANTED, world=GPUS.model_copy(update={"device": "cpu"}))
    assert machine_problems(facts, cpus, NODE) == []


def test_an_address_without_an_interface_is_a_problem_unless_the_user_names_one() -> None:
    lost = replace(NODE, interface=None)
    (problem,) = machine_problems(FACTS, WANTED, lost)
    assert "10.0.0.2" in problem and "NCCL_SOCKET_IFNAME" in problem
    assert machine_problems(FACTS, replace(WANTED, users={"NCCL_SOCKET_IFNAME": "bond0"}), lost) == []
    alone = replace(WANTED, world=GPUS.model_copy(update={"nodes": 1}))
    assert machine_problems(FACTS, alone, lost) == []


def test_clock_and_room_are_noted() -> None:
    (clock,) = machine_notes(FACTS, WANTED, replace(NODE, clock_offset_seconds=-37.2))
    assert "-37.2 s" in clock
    (room,) = machine_notes(replace(FACTS, free_bytes=50 * 1024**3), WANTED, NODE)
    assert "50.0 GiB free" in room and "100.0 GiB" in room


def test_a_missing_cuda_compiler_is_noted_where_gpus_are_used() -> None:
    (note,) = machine_notes(replace(FACTS, nvcc=False), WANTED, NODE)
    assert "nvcc" in note and "torch_adam" in note
    cpus = replace(WANTED, world=GPUS.model_copy(update={"device": "cpu"}))
    assert machine_notes(replace(FACTS, nvcc=False), cpus, NODE) == []


def test_every_problem_of_every_node_is_told_at_once() -> None:
    checks = [
        NodeCheck(0, NODE, FACTS),
        NodeCheck(1, NODE, FACTS, ["one", "two"]),
        NodeCheck(2, NODE, FACTS, ["three"]),
    ]
    with pytest.raises(RunFailed) as refused:
        refuse(checks)
    assert str(refused.value).splitlines() == ["node 1 (h2): one", "node 1 (h2): two", "node 2 (h2): three"]
    refuse(checks[:1])


def test_the_interface_is_set_for_gloo_and_nccl_and_the_users_wins() -> None:
    found = rank_environment(GPUS, "ib0", {"NCCL_DEBUG": "INFO", "HF_TOKEN": "secret", "HOME": "/root"}, {"A": "1"})
    assert (found["GLOO_SOCKET_IFNAME"], found["NCCL_SOCKET_IFNAME"]) == ("ib0", "=ib0")
    assert (found["NCCL_DEBUG"], found["A"], found["HF_HUB_OFFLINE"]) == ("INFO", "1", "1")
    assert "HF_TOKEN" not in found and "HOME" not in found
    users = rank_environment(GPUS, "ib0", {"NCCL_SOCKET_IFNAME": "bond0"}, {"GLOO_SOCKET_IFNAME": "eth1"})
    assert (users["NCCL_SOCKET_IFNAME"], users["GLOO_SOCKET_IFNAME"]) == ("bond0", "eth1")
