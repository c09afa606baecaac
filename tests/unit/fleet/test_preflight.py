"""What is held against a node before ranks are started on it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from launcher.errors import FailureCode, RunFailed
from launcher.fleet import inspect_node
from launcher.fleet.copy_data import _put
from launcher.fleet.environment import rank_environment
from launcher.fleet.inspect_node import NodeFacts
from launcher.fleet.nodes import Needs, Node, missing_in_words
from launcher.fleet.preflight import (
    NodeCheck,
    NodeProblem,
    Wanted,
    machine_notes,
    machine_problems,
    note_mixed_gpus,
    preflight,
    refuse,
)
from launcher.fleet.ray_settings import use_token
from launcher.plan.packages import needed_packages
from launcher.plan.schema import World
from launcher.prepare.machine import installed_versions
from launcher.run_dir import RunDir
from launcher.runs.console import preflight_table
from tests.unit.inputs import JOB, command, write_folder

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
    assert problem.code == "versions_differ"
    assert (
        problem.text == f"{package} missing, and {VERSIONS[package]} where the run was planned: install the same there"
    )


def test_a_package_that_the_json_needs_is_a_problem_where_it_is_missing() -> None:
    wanted = replace(WANTED, packages=needed_packages({"wandb": {"enabled": True}, "tensorboard": {"enabled": False}}))
    (problem,) = machine_problems(replace(FACTS, missing=frozenset({"wandb", "tensorboard", "mup"})), wanted, NODE)
    assert problem.code is FailureCode.PACKAGE_MISSING
    assert "wandb is not installed, which wandb.enabled in the DeepSpeed JSON needs" in problem.text
    assert machine_problems(replace(FACTS, missing=frozenset({"mup"})), wanted, NODE) == []


def test_a_lost_gpu_is_a_problem_where_gpus_are_used() -> None:
    facts = replace(FACTS, gpus=7)
    (problem,) = machine_problems(facts, WANTED, NODE)
    assert "7 GPUs seen of the 8" in problem.text and "nvidia-smi" in problem.text and problem.code == "node_unfit"
    cpus = replace(WANTED, world=GPUS.model_copy(update={"device": "cpu"}))
    assert machine_problems(facts, cpus, NODE) == []


def test_an_address_without_an_interface_is_a_problem_unless_the_user_names_one() -> None:
    lost = replace(NODE, interface=None)
    (problem,) = machine_problems(FACTS, WANTED, lost)
    assert "10.0.0.2" in problem.text and "NCCL_SOCKET_IFNAME" in problem.text and problem.code == "network"
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
    one, two, three = (
        NodeProblem(code, text)
        for code, text in (
            (FailureCode.NOT_SHARED, "one"),
            (FailureCode.VERSIONS_DIFFER, "two"),
            (FailureCode.NETWORK, "three"),
        )
    )
    checks = [
        NodeCheck(0, NODE, FACTS),
        NodeCheck(1, NODE, FACTS, [one, two]),
        NodeCheck(2, NODE, FACTS, [three]),
    ]
    with pytest.raises(RunFailed) as refused:
        refuse(checks)
    assert str(refused.value).splitlines() == ["node 1 (h2): one", "node 1 (h2): two", "node 2 (h2): three"]
    assert refused.value.code == "not_shared"
    refuse(checks[:1])


def test_the_interface_is_set_for_gloo_and_nccl_and_the_users_wins() -> None:
    found = rank_environment(GPUS, "ib0", {"NCCL_DEBUG": "INFO", "HF_TOKEN": "secret", "HOME": "/root"}, {"A": "1"})
    assert (found["GLOO_SOCKET_IFNAME"], found["NCCL_SOCKET_IFNAME"]) == ("ib0", "=ib0")
    assert (found["NCCL_DEBUG"], found["A"], found["HF_HUB_OFFLINE"]) == ("INFO", "1", "1")
    assert "HF_TOKEN" not in found and "HOME" not in found
    users = rank_environment(GPUS, "ib0", {"NCCL_SOCKET_IFNAME": "bond0"}, {"GLOO_SOCKET_IFNAME": "eth1"})
    assert (users["NCCL_SOCKET_IFNAME"], users["GLOO_SOCKET_IFNAME"]) == ("bond0", "eth1")


def test_gpus_of_another_kind_are_noted() -> None:
    checks = [
        NodeCheck(rank, NODE, replace(FACTS, gpu_name=name)) for rank, name in enumerate(("H100", "A100", "H100"))
    ]
    note_mixed_gpus(checks)
    assert [bool(check.notes) for check in checks] == [False, True, False]
    assert checks[1].notes[0].startswith("its GPUs are A100, and those of most nodes H100")
    refuse(checks)


def test_the_table_shows_the_versions_that_differ(capsys: pytest.CaptureFixture[str]) -> None:
    other = replace(FACTS, versions={**VERSIONS, "ray": "2.59.0"})
    for facts, shown in ((other, True), (FACTS, False)):
        Console(width=200).print(preflight_table([NodeCheck(0, NODE, FACTS), NodeCheck(1, NODE, facts)]))
        told = capsys.readouterr().out
        assert "2.13.0" in told and ("2.59.0" in told) == shown == ("ray" in told)
        assert "transformers" not in told


class PretendedNodes:
    """Two nodes whose agents answer here. Each sees the run directory at its own place."""

    def __init__(self, folders: Sequence[Path], rehearsed: Sequence[str | None] = (None, None)) -> None:
        self.nodes = [replace(NODE, host=f"h{rank + 1}", address=f"10.0.0.{rank + 1}") for rank in (0, 1)]
        self.folders, self.rehearsed = folders, rehearsed
        self.environments: list[dict[str, str]] = []

    def free_port(self, node_rank: int) -> int:
        return 4000 + node_rank

    def ask(self, method: str, arguments: Sequence[tuple[Any, ...]], seconds: float = 0.0) -> list[Any]:
        if method == "rehearse":
            assert seconds > arguments[0][1]
            self.environments = [environment for environment, _ in arguments]
            return list(self.rehearsed)
        act = getattr(inspect_node, method)
        return [act(str(folder), *rest) for folder, (_, *rest) in zip(self.folders, arguments, strict=True)]


def looked_at(nodes: PretendedNodes, run: Path) -> list[NodeCheck]:
    world = GPUS.model_copy(update={"device": "cpu", "backend": "gloo", "processes_per_node": 1})
    return preflight(nodes, Wanted(world, installed_versions(), 0, {}, {}), RunDir(run))  # type: ignore[arg-type]


def test_a_folder_that_is_not_shared_is_a_problem_of_its_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect_node, "_APPEAR_SECONDS", 0.2)
    run, own = tmp_path / "run", tmp_path / "own"
    for folder in (run, own / ".marks"):
        folder.mkdir(parents=True)
    good, bad = looked_at(apart := PretendedNodes((run, own)), run)
    assert (good.problems, apart.environments) == ([], [])
    assert [problem.text for problem in bad.problems] == [
        f"its {run} is not the launcher's: one does not see what the other wrote there; "
        "output_dir must be storage that all nodes share"
    ]
    (own / ".marks").rename(own / "gone")
    _, unwritable = looked_at(PretendedNodes((run, own)), run)
    assert {problem.code for problem in (*bad.problems, *unwritable.problems)} == {"not_shared"}
    assert [problem.text for problem in unwritable.problems] == [
        f"it cannot write to {run} (FileNotFoundError: No such file or directory): "
        "output_dir must be storage that all nodes share"
    ]


def test_a_rehearsal_that_fails_is_told_with_its_interface(tmp_path: Path) -> None:
    nodes = PretendedNodes((tmp_path, tmp_path), (None, "Connection refused"))
    checks = looked_at(nodes, tmp_path)
    with pytest.raises(RunFailed) as refused:
        refuse(checks)
    assert str(refused.value) == (
        "node 1 (h2): a small all-reduce over ib0 with gloo failed: Connection refused: "
        "open TCP between the nodes, or name the interface in cluster.env"
    )
    for rank, environment in enumerate(nodes.environments):
        assert (environment["RANK"], environment["WORLD_SIZE"], environment["LAUNCHER_BACKEND"]) == (
            str(rank),
            "2",
            "gloo",
        )
        assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("10.0.0.1", "4000")
        assert environment["GLOO_SOCKET_IFNAME"] == "ib0"


def test_what_is_missing_is_counted_by_what_is_free_now() -> None:
    has = {"CPU": 64.0, "GPU": 8.0}
    half_taken = [(has, {"CPU": 60.0, "GPU": 4.0})] * 2 + [(has, {"CPU": 64.0})]
    assert missing_in_words(Needs(1, 8, 8), half_taken) == (
        "asked for 1 node with 8 CPU and 8 GPU each; of 3 in this Ray 3 have that much, and 0 have it free now; "
        "GPU: too few free on 3, at most 4"
    )
    assert missing_in_words(Needs(2, 8, 0), [(has, has), ({"CPU": 4.0}, {})]) == (
        "asked for 2 nodes with 8 CPU each; of 2 in this Ray 1 have that much, and 1 have it free now"
    )


def test_the_file_with_the_secret_is_the_one_that_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray would take what is in the environment over it."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, "before")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "another")
    use_token(tmp_path / "key")
    assert "RAY_AUTH_TOKEN" not in os.environ
    assert os.environ["RAY_AUTH_TOKEN_PATH"] == str(tmp_path / "key")


def test_data_of_a_node_of_its_own_is_put_over_a_link_that_leads_nowhere(tmp_path: Path) -> None:
    own, wanted = tmp_path / "own", tmp_path / "there/wanted"
    own.mkdir()
    wanted.parent.mkdir()
    wanted.symlink_to(tmp_path / "gone")
    for _ in range(2):
        _put(str(own), str(wanted))
    assert wanted.resolve() == own
    assert [path.name for path in wanted.parent.iterdir()] == ["wanted"]


def test_the_doctor_of_slurms_nodes_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path, JOB.replace("}\ncluster: {", "}\nslurm: {time: '10'}\ncluster: {nodes: 2, "))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    ended = command("doctor", "job.yaml")
    assert ended.status == 2
    assert "srun --nodes=2 --ntasks-per-node=1 launcher node --doctor job.yaml" in ended.err
