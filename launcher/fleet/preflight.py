"""Checks all nodes before the ranks start."""

from __future__ import annotations

import secrets
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from launcher.errors import FailureCode, RunFailed
from launcher.fleet.environment import rank_environment
from launcher.fleet.health import FailedCheck, Matmul, NodeHealth, judge
from launcher.fleet.inspect_health import Probed, add_figures
from launcher.fleet.inspect_node import NodeFacts, missing_marks
from launcher.fleet.nodes import Node, Nodes
from launcher.job.schema import HealthChecks
from launcher.plan.schema import Plan, World
from launcher.records import HealthEvent
from launcher.run_dir import RunDir

_SAME_VERSIONS = ("launcher", "torch", "deepspeed", "transformers")
_CLOCK_SECONDS = 1.0
# Many nodes that load torch from a network file system at once take long.
_PROBE_SECONDS = 300.0
_PROBE = "the process that tries the devices"
_GRACE_SECONDS = 60.0
_GIB = 1024**3
_SHM_SHARE, _SHM_BYTES = 0.1, _GIB


@dataclass(frozen=True)
class NodeProblem:
    """Why a node cannot take part: a code, and a message with a hint."""

    code: FailureCode
    text: str


@dataclass
class NodeCheck:
    """The result of checking a node: `problems` prevent a run, `notes` do not. Each note has a hint.

    The `failed` checks of its health are among both.
    """

    node_rank: int
    node: Node
    facts: NodeFacts
    problems: list[NodeProblem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    health: NodeHealth = field(default_factory=NodeHealth)
    failed: list[FailedCheck] = field(default_factory=list)


@dataclass(frozen=True)
class Requirements:
    """What the nodes are checked against. `disk_bytes` is what a run writes; 0 if unknown.

    `packages`: the packages that the plan's DeepSpeed JSON needs, each with the key that needs it. `health_checks` is
    the job's cluster.health_checks.
    """

    world: World
    versions: Mapping[str, str]
    disk_bytes: int
    environment: Mapping[str, str]
    job_env: Mapping[str, str]
    packages: Mapping[str, str] = field(default_factory=dict)
    health_checks: HealthChecks = "auto"


def preflight(nodes: Nodes, required: Requirements, run: RunDir) -> list[NodeCheck]:
    """Checks every node, then its devices and the network in a process per node unless there are problems.

    Starts no rank. Writes an event with the figures of each node.
    """
    checks = inspect_nodes(nodes, required, run)
    if required.health_checks != "off":
        _measure_health(nodes, required, checks, run)
    unusable = any(check.problems for check in checks) or any(map(refusing, _judged(checks)))
    if not unusable and (len(checks) > 1 or required.health_checks == "full"):
        _run_probes(nodes, required, checks)
    for check, failed in zip(checks, _judged(checks), strict=True):
        check.failed = failed
        check.problems += [NodeProblem(FailureCode.NODE_FAULTY, each.text) for each in refusing(failed)]
        check.notes += [each.text for each in failed if not each.refuses]
        check.notes += [f"not checked: {text}" for text in check.health.unknown]
        if required.health_checks != "off":
            run.event(_health_event(check))
    return checks


def refusing(failed: Sequence[FailedCheck]) -> list[FailedCheck]:
    """Those of the failed checks for which a run must not start on the node."""
    return [each for each in failed if each.refuses]


def failed_checks(checks: Sequence[NodeCheck]) -> dict[int, list[FailedCheck]]:
    """The failed health checks by node rank, of the nodes that have any."""
    return {check.node_rank: check.failed for check in checks if check.failed}


def inspect_nodes(nodes: Nodes, required: Requirements, run: RunDir) -> list[NodeCheck]:
    """Checks what every node has and sees."""
    mark = secrets.token_hex(4)
    run.marks.mkdir(exist_ok=True)
    (run.marks / mark).write_text(mark)
    try:
        names = [f"{mark}-{rank}" for rank in range(len(nodes.nodes))]
        facts = nodes.ask("node_facts", [(str(run.path), name) for name in names])
        # A node that sees the launcher's mark, and whose mark the launcher sees, has the same directory.
        unseen = nodes.ask("missing_marks", [(str(run.path), [mark])] * len(names))
        lost = set(missing_marks(str(run.path), names))
    finally:
        shutil.rmtree(run.marks, ignore_errors=True)
    checks = [NodeCheck(rank, node, found) for rank, (node, found) in enumerate(zip(nodes.nodes, facts, strict=True))]
    for check, name, missing in zip(checks, names, unseen, strict=True):
        check.problems += _file_problems(check.facts, bool(missing) or name in lost, run)
        check.problems += machine_problems(check.facts, required, check.node)
        check.notes += machine_notes(check.facts, required, check.node)
    note_mixed_gpus(checks)
    return checks


def note_mixed_gpus(checks: Sequence[NodeCheck]) -> None:
    """Adds a note to each node whose GPUs differ from those of most nodes."""
    names = Counter(check.facts.gpu_name for check in checks if check.facts.gpus)
    for check in checks:
        usual = names.most_common(1)[0][0] if names else ""
        if check.facts.gpus and check.facts.gpu_name != usual:
            check.notes.append(
                f"its GPUs are {check.facts.gpu_name}, but those of most nodes are {usual}: the slowest GPU and the "
                "smallest GPU memory limit every update"
            )


def differing_versions(checks: Sequence[NodeCheck]) -> list[str]:
    """Packages whose versions differ between nodes."""
    packages = dict.fromkeys(name for check in checks for name in check.facts.versions)
    return [name for name in packages if len({check.facts.versions.get(name, "missing") for check in checks}) > 1]


def raise_problems(checks: Sequence[NodeCheck]) -> None:
    """Raises RunFailed with the problems of all nodes, if there are any. The code is that of the first problem."""
    found = [
        (problem.code, f"node {c.node_rank} ({c.node.host}): {problem.text}") for c in checks for problem in c.problems
    ]
    if found:
        raise RunFailed("\n".join(text for _, text in found), code=found[0][0])


def disk_bytes(plan: Plan) -> int:
    """The bytes that a run writes: its checkpoints, one more while it saves, and the exported model.

    A checkpoint has the weights, and 12 bytes per trained parameter (float32 weights and Adam's two moments).
    """
    width = 4 if plan.precision == "fp32" else 2
    weights = plan.training.model.parameters * width
    checkpoint = weights + 12 * plan.training.model.trainable_parameters
    section = plan.job.checkpoint
    kept = section.keep + 1 if section.every or section.keep_every else int(section.save_final)
    if section.keep_every:
        kept += plan.length.total_updates // section.keep_every
    kept += section.keep_best or 0
    return kept * checkpoint + (weights if plan.job.export else 0)


def machine_problems(facts: NodeFacts, required: Requirements, node: Node) -> list[NodeProblem]:
    """Problems that prevent a run on a node with these facts."""
    found: list[NodeProblem] = []
    for package in _SAME_VERSIONS:
        have, want = facts.versions.get(package, "missing"), required.versions[package]
        if have != want:
            text = f"{package} {have}, but {want} in the plan: install the same version on this node"
            found.append(NodeProblem(FailureCode.VERSIONS_DIFFER, text))
    for package, key in required.packages.items():
        if package in facts.missing:
            text = f"{package} is not installed, but {key} in the DeepSpeed JSON needs it: pip install {package}"
            found.append(NodeProblem(FailureCode.PACKAGE_MISSING, text))
    given = required.world.processes_per_node
    if required.world.device == "cuda" and facts.gpus < given:
        text = (
            f"torch sees {facts.gpus} of the {given} assigned GPUs ({', '.join(node.gpus)}): "
            "check nvidia-smi on this node, and whether its torch is a CUDA build"
        )
        found.append(NodeProblem(FailureCode.NODE_UNFIT, text))
    if required.world.nodes > 1 and node.interface is None and not _named_by_user(required):
        text = (
            f"no interface has the address {node.address}, at which the other nodes reach it: "
            "name the interface in cluster.env as GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
        )
        found.append(NodeProblem(FailureCode.NETWORK, text))
    return found


def machine_notes(facts: NodeFacts, required: Requirements, node: Node) -> list[str]:
    """Notes that do not prevent a run."""
    found = []
    if abs(node.clock_offset_seconds) > _CLOCK_SECONDS:
        found.append(
            f"its clock is {node.clock_offset_seconds:+.1f} s off, and so are the times in its logs: run chrony"
        )
    if required.world.device == "cuda" and not facts.nvcc:
        found.append(
            "nvcc not found (CUDA_HOME), which DeepSpeed needs to build its fused Adam: if ranks fail because of it, "
            'set "torch_adam": true in optimizer.params of the DeepSpeed JSON'
        )
    if not facts.unwritable and facts.free_bytes < required.disk_bytes:
        found.append(
            f"{facts.free_bytes / _GIB:.1f} GiB free for the run directory, which may need "
            f"{required.disk_bytes / _GIB:.1f} GiB: free disk space, or keep fewer checkpoints (checkpoint.keep)"
        )
    if facts.shm_free_bytes < max(_SHM_SHARE * facts.shm_bytes, _SHM_BYTES if facts.shm_bytes else 0):
        found.append(
            f"{facts.shm_free_bytes / _GIB:.1f} of {facts.shm_bytes / _GIB:.1f} GiB free in /dev/shm, the shared "
            "memory of ranks and data loaders: remove files of ended processes there, or enlarge it (in a container: "
            "--shm-size)"
        )
    return found


def _named_by_user(required: Requirements) -> bool:
    given = {**required.environment, **required.job_env}
    return "GLOO_SOCKET_IFNAME" in given or "NCCL_SOCKET_IFNAME" in given


def _file_problems(facts: NodeFacts, not_shared: bool, run: RunDir) -> list[NodeProblem]:
    """Problems with the run directory, which must be the same folder on all nodes."""
    hint = "output_dir must be storage that all nodes share"
    if facts.unwritable:
        text = f"cannot write to {run.path} ({facts.unwritable}): {hint}"
    elif not_shared:
        text = f"its {run.path} is not the launcher's: files written on one are not visible on the other; {hint}"
    else:
        return []
    return [NodeProblem(FailureCode.NOT_SHARED, text)]


def _judged(checks: Sequence[NodeCheck]) -> list[list[FailedCheck]]:
    return judge([check.health for check in checks])


def _health_event(check: NodeCheck) -> HealthEvent:
    """The event with the figures of a node's health checks."""
    health = check.health
    return {
        "event": "health",
        "node_rank": check.node_rank,
        "host": check.node.host,
        "disk_bytes_per_second": health.disk_bytes_per_second,
        "gpus": [asdict(each) for each in health.gpus],
        "xids": [asdict(each) for each in health.xids],
        "matmuls": [asdict(each) for each in health.matmuls],
        "links": {str(peer): speed for peer, speed in health.links.items()},
        "ring_bytes_per_second": health.ring_bytes_per_second,
        "unknown": health.unknown,
        "failed": [asdict(each) for each in check.failed],
    }


def _measure_health(nodes: Nodes, required: Requirements, checks: Sequence[NodeCheck], run: RunDir) -> None:
    order = (str(run.path), required.world.device == "cuda", required.health_checks == "full")
    for check, health in zip(checks, nodes.ask("measure_health", [order] * len(checks)), strict=True):
        check.health = health


def _run_probes(nodes: Nodes, required: Requirements, checks: Sequence[NodeCheck]) -> None:
    """One process per node tries its devices, and an all-reduce over the interfaces that were found."""
    shared = {
        "MASTER_ADDR": nodes.nodes[0].address,
        "MASTER_PORT": str(nodes.free_port(0)),
        "WORLD_SIZE": str(len(checks)),
        "LAUNCHER_BACKEND": required.world.backend,
        "LAUNCHER_DEVICE": required.world.device,
        "LAUNCHER_HEALTH_CHECKS": required.health_checks,
    }
    orders = []
    for check in checks:
        own = rank_environment(required.world, check.node.interface, required.environment, required.job_env)
        orders.append(({**own, **shared, "RANK": str(check.node_rank), "LOCAL_RANK": "0"}, _PROBE_SECONDS))
    answers: list[Probed] = nodes.ask("run_probe", orders, _PROBE_SECONDS + _GRACE_SECONDS)
    for check, probed in zip(checks, answers, strict=True):
        add_figures(check.health, probed.figures)
        if probed.error and required.health_checks != "off" and not check.health.matmuls:
            # It ended before it came to the network.
            check.health.matmuls.append(Matmul(_PROBE, "", error=probed.error))
    if any(matmul.device == _PROBE for check in checks for matmul in check.health.matmuls):
        # The other nodes only miss the probe that ended.
        return
    for check, probed in zip(checks, answers, strict=True):
        if probed.error:
            text = (
                f"a small all-reduce over {check.node.interface} with {required.world.backend} failed: {probed.error}: "
                "allow TCP between the nodes, or name the interface in cluster.env"
            )
            check.problems.append(NodeProblem(FailureCode.NETWORK, text))
