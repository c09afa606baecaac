"""Checks of the nodes before ranks start."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from launcher.errors import FailureCode, RunFailed
from launcher.fleet import inspect_health, inspect_node
from launcher.fleet.copy_data import _link
from launcher.fleet.environment import flight_recorder, rank_environment
from launcher.fleet.inspect_health import Probed
from launcher.fleet.inspect_node import NodeFacts
from launcher.fleet.node_resources import NodeResources, describe_shortage
from launcher.fleet.nodes import Node
from launcher.fleet.preflight import (
    NodeCheck,
    NodeProblem,
    Requirements,
    failed_checks,
    machine_notes,
    machine_problems,
    note_mixed_gpus,
    preflight,
    raise_problems,
    refusing,
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
WANTED = Requirements(GPUS, VERSIONS, 100 * 1024**3, {}, {})
NODE = Node(None, "h2", "10.0.0.2", tuple("01234567"), "ib0")
FACTS = NodeFacts(VERSIONS, 8, "NVIDIA H100", 500 * 1024**3, None)


def test_a_good_node_has_no_problems_and_no_notes() -> None:
    assert machine_problems(FACTS, WANTED, NODE) == []
    assert machine_notes(FACTS, WANTED, NODE) == []


@pytest.mark.parametrize("package", ["launcher", "torch", "deepspeed", "transformers"])
def test_a_different_version_is_a_problem(package: str) -> None:
    (problem,) = machine_problems(replace(FACTS, versions={**VERSIONS, package: "missing"}), WANTED, NODE)
    assert problem.code == "versions_differ"
    assert (
        problem.text == f"{package} missing, but {VERSIONS[package]} in the plan: install the same version on this node"
    )


def test_a_missing_package_that_the_json_needs_is_a_problem() -> None:
    required = replace(
        WANTED, packages=needed_packages({"wandb": {"enabled": True}, "tensorboard": {"enabled": False}})
    )
    (problem,) = machine_problems(replace(FACTS, missing=frozenset({"wandb", "tensorboard", "mup"})), required, NODE)
    assert problem.code is FailureCode.PACKAGE_MISSING
    assert "wandb is not installed, but wandb.enabled in the DeepSpeed JSON needs it" in problem.text
    assert machine_problems(replace(FACTS, missing=frozenset({"mup"})), required, NODE) == []


def test_a_missing_gpu_is_a_problem_if_gpus_are_used() -> None:
    facts = replace(FACTS, gpus=7)
    (problem,) = machine_problems(facts, WANTED, NODE)
    assert (
        "torch sees 7 of the 8 assigned GPUs" in problem.text
        and "nvidia-smi" in problem.text
        and problem.code == "node_unfit"
    )
    cpus = replace(WANTED, world=GPUS.model_copy(update={"device": "cpu"}))
    assert machine_problems(facts, cpus, NODE) == []


def test_an_address_without_an_interface_is_a_problem_unless_the_job_names_one() -> None:
    lost = replace(NODE, interface=None)
    (problem,) = machine_problems(FACTS, WANTED, lost)
    assert "10.0.0.2" in problem.text and "NCCL_SOCKET_IFNAME" in problem.text and problem.code == "network"
    assert machine_problems(FACTS, replace(WANTED, job_env={"NCCL_SOCKET_IFNAME": "bond0"}), lost) == []
    alone = replace(WANTED, world=GPUS.model_copy(update={"nodes": 1}))
    assert machine_problems(FACTS, alone, lost) == []


def test_notes_on_clock_and_disk_space() -> None:
    (clock,) = machine_notes(FACTS, WANTED, replace(NODE, clock_offset_seconds=-37.2))
    assert "-37.2 s" in clock
    (disk,) = machine_notes(replace(FACTS, free_bytes=50 * 1024**3), WANTED, NODE)
    assert "50.0 GiB free" in disk and "100.0 GiB" in disk


@pytest.mark.parametrize(
    ("free_gib", "total_gib", "noted"), [(9.9, 100, True), (10.1, 100, False), (0.9, 4, True), (1.1, 4, False)]
)
def test_note_on_shared_memory_that_is_nearly_full(free_gib: float, total_gib: int, noted: bool) -> None:
    facts = replace(FACTS, shm_free_bytes=int(free_gib * 1024**3), shm_bytes=total_gib * 1024**3)
    notes = machine_notes(facts, WANTED, NODE)
    assert len(notes) == noted
    if noted:
        assert notes[0].startswith(f"{free_gib} of {total_gib}.0 GiB free in /dev/shm") and "--shm-size" in notes[0]


def test_the_facts_of_a_node_have_the_space_of_shared_memory(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path, "run")
    run.marks.mkdir()
    facts = inspect_node.node_facts(str(run.path), "mark")
    assert (
        0 < facts.shm_free_bytes <= facts.shm_bytes == os.statvfs("/dev/shm").f_blocks * os.statvfs("/dev/shm").f_frsize
    )


def test_note_on_a_missing_cuda_compiler_if_gpus_are_used() -> None:
    (note,) = machine_notes(replace(FACTS, nvcc=False), WANTED, NODE)
    assert "nvcc" in note and "torch_adam" in note
    cpus = replace(WANTED, world=GPUS.model_copy(update={"device": "cpu"}))
    assert machine_notes(replace(FACTS, nvcc=False), cpus, NODE) == []


def test_all_problems_of_all_nodes_are_reported_at_once() -> None:
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
    with pytest.raises(RunFailed) as raised:
        raise_problems(checks)
    assert str(raised.value).splitlines() == ["node 1 (h2): one", "node 1 (h2): two", "node 2 (h2): three"]
    assert raised.value.code == "not_shared"
    raise_problems(checks[:1])


def test_the_interface_is_set_for_gloo_and_nccl_unless_the_user_sets_one() -> None:
    found = rank_environment(GPUS, "ib0", {"NCCL_DEBUG": "INFO", "HF_TOKEN": "secret", "HOME": "/root"}, {"A": "1"})
    assert (found["GLOO_SOCKET_IFNAME"], found["NCCL_SOCKET_IFNAME"]) == ("ib0", "=ib0")
    assert (found["NCCL_DEBUG"], found["A"], found["HF_HUB_OFFLINE"]) == ("INFO", "1", "1")
    assert "HF_TOKEN" not in found and "HOME" not in found
    job_env = rank_environment(GPUS, "ib0", {"NCCL_SOCKET_IFNAME": "bond0"}, {"GLOO_SOCKET_IFNAME": "eth1"})
    assert (job_env["NCCL_SOCKET_IFNAME"], job_env["GLOO_SOCKET_IFNAME"]) == ("bond0", "eth1")


def test_note_on_gpus_that_differ_from_most_nodes() -> None:
    checks = [
        NodeCheck(rank, NODE, replace(FACTS, gpu_name=name)) for rank, name in enumerate(("H100", "A100", "H100"))
    ]
    note_mixed_gpus(checks)
    assert [bool(check.notes) for check in checks] == [False, True, False]
    assert checks[1].notes[0].startswith("its GPUs are A100, but those of most nodes are H100")
    raise_problems(checks)


def test_the_table_shows_versions_that_differ(capsys: pytest.CaptureFixture[str]) -> None:
    other = replace(FACTS, versions={**VERSIONS, "ray": "2.59.0"})
    for facts, shown in ((other, True), (FACTS, False)):
        Console(width=200).print(preflight_table([NodeCheck(0, NODE, FACTS), NodeCheck(1, NODE, facts)]))
        printed = capsys.readouterr().out
        assert "2.13.0" in printed and ("2.59.0" in printed) == shown == ("ray" in printed)
        assert "transformers" not in printed


GOOD_MATMUL = {"matmul": {"device": "CPU", "name": "CPU", "tflops": 0.1, "wrong": 0}}
GOOD = Probed(None, [GOOD_MATMUL])


class LocalNodes:
    """Nodes whose agents answer in this process. Each sees the run directory at its own path."""

    def __init__(self, folders: Sequence[Path], probed: Sequence[Probed] = (GOOD, GOOD)) -> None:
        self.nodes = [replace(NODE, host=f"h{rank + 1}", address=f"10.0.0.{rank + 1}") for rank in range(len(folders))]
        self.folders, self.probed = folders, probed
        self.environments: list[dict[str, str]] = []

    def free_port(self, node_rank: int) -> int:
        return 4000 + node_rank

    def ask(self, method: str, arguments: Sequence[tuple[Any, ...]], seconds: float = 0.0) -> list[Any]:
        if method == "run_probe":
            assert seconds > arguments[0][1]
            self.environments = [environment for environment, _ in arguments]
            return list(self.probed)
        function = getattr(inspect_health if method == "measure_health" else inspect_node, method)
        return [function(str(folder), *rest) for folder, (_, *rest) in zip(self.folders, arguments, strict=True)]


def checked(nodes: LocalNodes, run: Path, *, device: str = "cpu", health_checks: str = "auto") -> list[NodeCheck]:
    world = GPUS.model_copy(
        update={"device": device, "backend": "gloo", "processes_per_node": 0 if device == "cuda" else 1}
    )
    required = Requirements(world, installed_versions(), 0, {}, {}, health_checks=health_checks)  # type: ignore[arg-type]
    return preflight(nodes, required, RunDir(run))  # type: ignore[arg-type]


def test_a_run_directory_that_is_not_shared_is_a_problem_of_its_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspect_node, "_APPEAR_SECONDS", 0.2)
    run, own = tmp_path / "run", tmp_path / "own"
    for folder in (run, own / ".marks"):
        folder.mkdir(parents=True)
    good, bad = checked(nodes := LocalNodes((run, own)), run)
    assert (good.problems, nodes.environments) == ([], [])
    assert [problem.text for problem in bad.problems] == [
        f"its {run} is not the launcher's: files written on one are not visible on the other; "
        "output_dir must be storage that all nodes share"
    ]
    (own / ".marks").rename(own / "gone")
    _, unwritable = checked(LocalNodes((run, own)), run)
    assert {problem.code for problem in (*bad.problems, *unwritable.problems)} == {"not_shared"}
    assert [problem.text for problem in unwritable.problems] == [
        f"cannot write to {run} (FileNotFoundError: No such file or directory): "
        "output_dir must be storage that all nodes share"
    ]


def test_a_failed_all_reduce_is_reported_with_its_interface(tmp_path: Path) -> None:
    nodes = LocalNodes((tmp_path, tmp_path), (GOOD, Probed("Connection refused", [GOOD_MATMUL])))
    checks = checked(nodes, tmp_path)
    with pytest.raises(RunFailed) as raised:
        raise_problems(checks)
    assert str(raised.value) == (
        "node 1 (h2): a small all-reduce over ib0 with gloo failed: Connection refused: "
        "allow TCP between the nodes, or name the interface in cluster.env"
    )
    for rank, environment in enumerate(nodes.environments):
        assert (environment["RANK"], environment["WORLD_SIZE"], environment["LAUNCHER_BACKEND"]) == (
            str(rank),
            "2",
            "gloo",
        )
        assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("10.0.0.1", "4000")
        assert environment["GLOO_SOCKET_IFNAME"] == "ib0"


def health_events(run: Path) -> list[dict[str, Any]]:
    return [event for event in RunDir(run).events() if event["event"] == "health"]


def test_figures_of_the_health_checks_are_in_the_table_and_the_events(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    links = [{"link": 1, "bytes_per_second": 3e9}, {"ring": 2e9}], [{"link": 0, "bytes_per_second": 3e9}]
    nodes = LocalNodes((tmp_path, tmp_path), [Probed(None, [GOOD_MATMUL, *each]) for each in links])
    checks = checked(nodes, tmp_path)
    raise_problems(checks)
    assert [environment["LAUNCHER_HEALTH_CHECKS"] for environment in nodes.environments] == ["auto", "auto"]
    first, second = health_events(tmp_path)
    assert (first["host"], first["links"], first["ring_bytes_per_second"]) == ("h1", {"1": 3e9}, 2e9)
    assert (second["node_rank"], second["matmuls"]) == (1, [{**GOOD_MATMUL["matmul"], "error": None}])
    assert first["disk_bytes_per_second"] > 0 and second["disk_bytes_per_second"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["events.jsonl"], "what was written to measure is removed"
    Console(width=200).print(preflight_table(checks))
    printed = capsys.readouterr().out
    assert all(words in printed for words in ("TFLOP/s", "network", "3 GB/s", "disk"))


def test_a_slow_node_is_noted_and_a_wrong_product_refuses_its_node(tmp_path: Path) -> None:
    slow = {"matmul": {**GOOD_MATMUL["matmul"], "tflops": 0.01}}
    wrong = {"matmul": {**GOOD_MATMUL["matmul"], "wrong": 4}}
    folders = (tmp_path,) * 4
    checks = checked(LocalNodes(folders, [GOOD, Probed(None, [slow]), Probed(None, [wrong]), GOOD]), tmp_path)
    assert [bool(check.notes) for check in checks] == [False, True, False, False]
    assert checks[1].notes[0].startswith("CPU multiplies at 0.01 TFLOP/s, 10% of the median 0.1")
    with pytest.raises(RunFailed) as raised:
        raise_problems(checks)
    assert raised.value.code == "node_faulty"
    assert str(raised.value).startswith("node 2 (h3): CPU multiplies wrongly (wrong elements of a known product: 4)")
    failed = failed_checks(checks)
    assert {rank: [each.check for each in found] for rank, found in failed.items()} == {1: ["tflops"], 2: ["matmul"]}
    assert [len(refusing(failed[rank])) for rank in (1, 2)] == [0, 1]
    assert [bool(event["failed"]) for event in health_events(tmp_path)] == [False, True, True, False]


def test_a_probe_that_dies_before_the_network_refuses_its_node_alone(tmp_path: Path) -> None:
    """The other node's probe fails because its peer is gone."""
    lost = Probed("RuntimeError: Connection closed by peer", [GOOD_MATMUL])
    checks = checked(LocalNodes((tmp_path, tmp_path), (lost, Probed("exit status -11"))), tmp_path)
    assert [[problem.code for problem in check.problems] for check in checks] == [[], ["node_faulty"]]
    assert "cannot multiply matrices (exit status -11)" in checks[1].problems[0].text


def test_a_wrong_product_on_one_node_hides_no_network_failure_of_another(tmp_path: Path) -> None:
    wrong = Probed(None, [{"matmul": {**GOOD_MATMUL["matmul"], "wrong": 4}}])
    checks = checked(LocalNodes((tmp_path, tmp_path), (wrong, Probed("Connection refused", [GOOD_MATMUL]))), tmp_path)
    assert [[problem.code for problem in check.problems] for check in checks] == [["node_faulty"], ["network"]]


@pytest.mark.parametrize(("health_checks", "probes"), [("off", 0), ("auto", 0), ("full", 1)])
def test_on_one_machine_only_full_checks_start_a_process(tmp_path: Path, health_checks: str, probes: int) -> None:
    nodes = LocalNodes((tmp_path,), (GOOD,))
    (check,) = checked(nodes, tmp_path, health_checks=health_checks)
    assert len(nodes.environments) == probes
    assert (check.health.disk_bytes_per_second is None) == (health_checks == "off")
    assert len(health_events(tmp_path)) == (health_checks != "off")


def test_without_health_checks_the_network_is_still_tried(tmp_path: Path) -> None:
    nodes = LocalNodes((tmp_path, tmp_path), (Probed(None), Probed("Connection refused")))
    good, bad = checked(nodes, tmp_path, health_checks="off")
    assert [environment["LAUNCHER_HEALTH_CHECKS"] for environment in nodes.environments] == ["off", "off"]
    assert (good.problems, [problem.code for problem in bad.problems]) == ([], ["network"])
    assert health_events(tmp_path) == []


def nvidia_smi(folder: Path, rows: Sequence[str]) -> Path:
    """A folder for the PATH with an nvidia-smi that prints these rows."""
    folder.mkdir()
    program = folder / "nvidia-smi"
    program.write_text("#!/bin/sh\ncat <<'END'\n" + "\n".join(rows) + "\nEND\n")
    program.chmod(0o755)
    return folder


GPU_ROW = "{}, GPU-000{}, NVIDIA H200, 00000000:{}9:00.0, 143771, 143156, {}, 0, No, No, 0x0000000000000001, 16, 16"


def test_uncorrected_memory_errors_of_an_assigned_gpu_refuse_the_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = nvidia_smi(tmp_path / "bin", [GPU_ROW.format(k, k, k, 7 if k == 1 else 0) for k in range(3)])
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    (run := tmp_path / "run").mkdir()
    for assigned, refused in (("0,2", False), ("0,1", True)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", assigned)
        nodes = LocalNodes((run,), (GOOD,))
        (check,) = checks = checked(nodes, run, device="cuda", health_checks="full")
        assert [gpu.index for gpu in check.health.gpus] == [int(index) for index in assigned.split(",")]
        assert bool(nodes.environments) != refused, "a faulty GPU is not tried"
        if refused:
            with pytest.raises(RunFailed, match=r"node 0 \(h1\): GPU 1 has 7 uncorrected memory errors"):
                raise_problems(checks)
        else:
            raise_problems(checks)
    assert [each["uncorrected_errors"] for each in health_events(run)[-1]["gpus"]] == [0, 7]


def test_gpu_errors_do_not_count_for_a_run_on_cpus_and_a_missing_nvidia_smi_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = nvidia_smi(tmp_path / "bin", [GPU_ROW.format(0, 0, 1, 7)])
    (run := tmp_path / "run").mkdir()
    monkeypatch.setenv("PATH", str(programs))
    (check,) = checked(LocalNodes((run,)), run)
    assert (check.problems, check.health.gpus) == ([], [])
    (programs / "nvidia-smi").unlink()
    (check,) = checked(LocalNodes((run,)), run, device="cuda")
    assert check.problems == []
    assert "not checked: the state of the GPUs: nvidia-smi: No such file or directory" in check.notes


def test_a_slow_disk_is_measured_with_one_chunk_and_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, fsync = [], os.fsync

    def slow(descriptor: int) -> None:
        fsync(descriptor)
        synced.append(os.fstat(descriptor).st_size)
        time.sleep(0.6)

    monkeypatch.setattr(os, "fsync", slow)
    speed = inspect_health.measure_health(str(tmp_path), gpus=False, full=False).disk_bytes_per_second
    assert synced == [4 * 1024**2]
    assert speed is not None and speed < synced[0] / 0.6
    (check,) = checked(LocalNodes((tmp_path,)), tmp_path)
    assert [failed.check for failed in check.failed] == ["disk"] and check.problems == []
    assert "MB/s to the run directory: checkpoints will take long" in check.notes[0]


def test_a_write_speed_that_cannot_be_measured_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    health = inspect_health.measure_health(str(tmp_path), gpus=False, full=False)
    assert health.disk_bytes_per_second is None
    assert health.unknown == ["the write speed to the run directory: OSError: No space left on device"]
    assert list(tmp_path.iterdir()) == []


def test_a_shortage_is_described_by_what_is_free_now() -> None:
    has = {"CPU": 64.0, "GPU": 8.0}
    half_taken = [(has, {"CPU": 60.0, "GPU": 4.0})] * 2 + [(has, {"CPU": 64.0})]
    assert describe_shortage(NodeResources(1, 8, 8), half_taken) == (
        "asked for 1 node with 8 CPU and 8 GPU each; nodes in this Ray: 3, large enough: 3, with enough free now: 0; "
        "GPU: too few free on 3 nodes, at most 4"
    )
    assert describe_shortage(NodeResources(2, 8, 0), [(has, has), ({"CPU": 4.0}, {})]) == (
        "asked for 2 nodes with 8 CPU each; nodes in this Ray: 2, large enough: 1, with enough free now: 1"
    )


def test_the_token_file_replaces_a_token_in_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray would prefer the token in the environment."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, "before")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "another")
    use_token(tmp_path / "key")
    assert "RAY_AUTH_TOKEN" not in os.environ
    assert os.environ["RAY_AUTH_TOKEN_PATH"] == str(tmp_path / "key")


def test_a_nodes_own_data_replaces_a_broken_link(tmp_path: Path) -> None:
    own, target = tmp_path / "own", tmp_path / "there/target"
    own.mkdir()
    target.parent.mkdir()
    target.symlink_to(tmp_path / "gone")
    for _ in range(2):
        _link(str(own), str(target))
    assert target.resolve() == own
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_outside_of_slurm_doctor_prints_the_srun_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path, JOB.replace("}\ncluster: {", "}\nslurm: {time: '10'}\ncluster: {nodes: 2, "))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    ended = command("doctor", "job.yaml")
    assert ended.status == 2
    assert "srun --nodes=2 --ntasks-per-node=1 launcher node --doctor job.yaml" in ended.err


def test_nccl_records_collectives_in_the_nodes_log_folder_unless_the_user_sets_another(tmp_path: Path) -> None:
    found = flight_recorder(GPUS, tmp_path, {})
    assert found["TORCH_FR_DUMP_TEMP_FILE"] == found["TORCH_NCCL_DEBUG_INFO_TEMP_FILE"] == f"{tmp_path}/nccl-rank-"
    assert flight_recorder(GPUS, tmp_path, {}, 2)["TORCH_FR_DUMP_TEMP_FILE"] == f"{tmp_path}/nccl-attempt-2-rank-"
    assert found["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1" and int(found["TORCH_FR_BUFFER_SIZE"]) > 0
    own = {**found, **rank_environment(GPUS, "ib0", {"TORCH_FR_BUFFER_SIZE": "9"}, {})}
    assert own["TORCH_FR_BUFFER_SIZE"] == "9"
    assert flight_recorder(GPUS.model_copy(update={"backend": "gloo", "device": "cpu"}), tmp_path, {}) == {}


@pytest.mark.parametrize(
    ("new", "old"),
    [
        ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"),
        ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"),
    ],
)
def test_a_setting_of_the_flight_recorder_under_either_name_is_the_users(new: str, old: str, tmp_path: Path) -> None:
    """PyTorch prefers the new name: it must not be set beside the user's old one."""
    everything = flight_recorder(GPUS, tmp_path, {})
    for name in (new, old):
        found = flight_recorder(GPUS, tmp_path, {name: "5"})
        assert set(everything) - set(found) == {new, old}
