"""The check of all nodes before ranks are started: a few seconds that save an allocation."""

from __future__ import annotations

import secrets
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from launcher.errors import FailureCode, RunFailed
from launcher.fleet.environment import rank_environment
from launcher.fleet.inspect_node import NodeFacts, unseen
from launcher.fleet.nodes import Node, Nodes
from launcher.plan.schema import Plan, World
from launcher.run_dir import RunDir

_SAME_VERSIONS = ("launcher", "torch", "deepspeed", "transformers")
_CLOCK_SECONDS = 1.0
# Loading torch from a network file system takes its time on many nodes at once.
_REHEARSAL_SECONDS = 300.0
_GRACE_SECONDS = 60.0
_GIB = 1024**3


@dataclass(frozen=True)
class NodeProblem:
    """Why a node cannot take part: the kind, and a sentence with its hint."""

    code: FailureCode
    text: str


@dataclass
class NodeCheck:
    """A node as it was found: `problems` forbid a run, `notes` do not. Each note is a sentence with its hint."""

    node_rank: int
    node: Node
    facts: NodeFacts
    problems: list[NodeProblem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Wanted:
    """What the nodes are checked against. `room_bytes` is what a run writes; 0 where that is not known.

    `packages`: those that the plan's DeepSpeed JSON needs, each with the key that asks for it.
    """

    world: World
    versions: Mapping[str, str]
    room_bytes: int
    environment: Mapping[str, str]
    users: Mapping[str, str]
    packages: Mapping[str, str] = field(default_factory=dict)


def preflight(nodes: Nodes, wanted: Wanted, run: RunDir) -> list[NodeCheck]:
    """Looks at every node, and has all of them reduce a tensor if there is nothing wrong so far. Starts no rank."""
    checks = look(nodes, wanted, run)
    if len(checks) > 1 and not any(check.problems for check in checks):
        _rehearse(nodes, wanted, checks)
    return checks


def look(nodes: Nodes, wanted: Wanted, run: RunDir) -> list[NodeCheck]:
    """What every node has and sees."""
    mark = secrets.token_hex(4)
    run.marks.mkdir(exist_ok=True)
    (run.marks / mark).write_text(mark)
    try:
        names = [f"{mark}-{rank}" for rank in range(len(nodes.nodes))]
        facts = nodes.ask("look", [(str(run.path), name) for name in names])
        # Who sees the launcher's mark, and whose mark the launcher sees, has the same directory as all the others.
        blind = nodes.ask("unseen", [(str(run.path), [mark])] * len(names))
        lost = set(unseen(str(run.path), names))
    finally:
        shutil.rmtree(run.marks, ignore_errors=True)
    checks = [NodeCheck(rank, node, found) for rank, (node, found) in enumerate(zip(nodes.nodes, facts, strict=True))]
    for check, name, missing in zip(checks, names, blind, strict=True):
        check.problems += _file_problems(check.facts, bool(missing) or name in lost, run)
        check.problems += machine_problems(check.facts, wanted, check.node)
        check.notes += machine_notes(check.facts, wanted, check.node)
    note_mixed_gpus(checks)
    return checks


def note_mixed_gpus(checks: Sequence[NodeCheck]) -> None:
    """Notes each node whose GPUs are not those of most nodes."""
    names = Counter(check.facts.gpu_name for check in checks if check.facts.gpus)
    for check in checks:
        usual = names.most_common(1)[0][0] if names else ""
        if check.facts.gpus and check.facts.gpu_name != usual:
            check.notes.append(
                f"its GPUs are {check.facts.gpu_name}, and those of most nodes {usual}: every update takes as long as "
                "on the slowest, and the least memory counts"
            )


def differing_versions(checks: Sequence[NodeCheck]) -> list[str]:
    """Packages that are not of the same version on all nodes."""
    packages = dict.fromkeys(name for check in checks for name in check.facts.versions)
    return [name for name in packages if len({check.facts.versions.get(name, "missing") for check in checks}) > 1]


def refuse(checks: Sequence[NodeCheck]) -> None:
    """Raises RunFailed with every problem of every node, if there is one. The code is that of the first."""
    found = [
        (problem.code, f"node {c.node_rank} ({c.node.host}): {problem.text}") for c in checks for problem in c.problems
    ]
    if found:
        raise RunFailed("\n".join(text for _, text in found), code=found[0][0])


def room_bytes(plan: Plan) -> int:
    """What a run writes: its checkpoints, with one more while it is saved, and the exported model.

    A checkpoint has float32 weights and Adam's two moments (12 bytes) of what is trained and the weights themselves.
    """
    width = 4 if plan.precision == "fp32" else 2
    weights = plan.training.model.parameters * width
    checkpoint = weights + 12 * plan.training.model.trainable_parameters
    kept = plan.job.checkpoint.keep + 1 if plan.job.checkpoint.every else int(plan.job.checkpoint.save_final)
    return kept * checkpoint + (weights if plan.job.export else 0)


def machine_problems(facts: NodeFacts, wanted: Wanted, node: Node) -> list[NodeProblem]:
    """What forbids a run on a node with these facts."""
    found: list[NodeProblem] = []
    for package in _SAME_VERSIONS:
        have, want = facts.versions.get(package, "missing"), wanted.versions[package]
        if have != want:
            text = f"{package} {have}, and {want} where the run was planned: install the same there"
            found.append(NodeProblem(FailureCode.VERSIONS_DIFFER, text))
    for package, key in wanted.packages.items():
        if package in facts.missing:
            text = f"{package} is not installed, which {key} in the DeepSpeed JSON needs: pip install {package}"
            found.append(NodeProblem(FailureCode.PACKAGE_MISSING, text))
    given = wanted.world.processes_per_node
    if wanted.world.device == "cuda" and facts.gpus < given:
        text = (
            f"{facts.gpus} GPUs seen of the {given} that were given ({', '.join(node.gpus)}): "
            "see nvidia-smi there, and whether its torch is a CUDA build"
        )
        found.append(NodeProblem(FailureCode.NODE_UNFIT, text))
    if wanted.world.nodes > 1 and node.interface is None and not _named_by_user(wanted):
        text = (
            f"no interface has the address {node.address}, at which the others reach it: "
            "name it in cluster.env as GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
        )
        found.append(NodeProblem(FailureCode.NETWORK, text))
    return found


def machine_notes(facts: NodeFacts, wanted: Wanted, node: Node) -> list[str]:
    """What is odd and no reason to stop."""
    found = []
    if abs(node.clock_offset_seconds) > _CLOCK_SECONDS:
        found.append(
            f"its clock is {node.clock_offset_seconds:+.1f} s off: times in its logs are shifted by as much; run chrony"
        )
    if wanted.world.device == "cuda" and not facts.nvcc:
        found.append(
            "no nvcc (CUDA_HOME), with which DeepSpeed builds its fused Adam where it was not built before: "
            'should ranks fail for it, give optimizer.params "torch_adam": true in the DeepSpeed JSON'
        )
    if not facts.unwritable and facts.free_bytes < wanted.room_bytes:
        found.append(
            f"{facts.free_bytes / _GIB:.1f} GiB free for the run directory, which may need "
            f"{wanted.room_bytes / _GIB:.1f} GiB: make room, or keep fewer checkpoints (checkpoint.keep)"
        )
    return found


def _named_by_user(wanted: Wanted) -> bool:
    given = {**wanted.environment, **wanted.users}
    return "GLOO_SOCKET_IFNAME" in given or "NCCL_SOCKET_IFNAME" in given


def _file_problems(facts: NodeFacts, apart: bool, run: RunDir) -> list[NodeProblem]:
    """Whether the run directory is one and the same for all."""
    hint = "output_dir must be storage that all nodes share"
    if facts.unwritable:
        text = f"it cannot write to {run.path} ({facts.unwritable}): {hint}"
    elif apart:
        text = f"its {run.path} is not the launcher's: one does not see what the other wrote there; {hint}"
    else:
        return []
    return [NodeProblem(FailureCode.NOT_SHARED, text)]


def _rehearse(nodes: Nodes, wanted: Wanted, checks: list[NodeCheck]) -> None:
    """One all-reduce, a process a node, over the interfaces that were found."""
    shared = {
        "MASTER_ADDR": nodes.nodes[0].address,
        "MASTER_PORT": str(nodes.free_port(0)),
        "WORLD_SIZE": str(len(checks)),
        "LAUNCHER_BACKEND": wanted.world.backend,
    }
    orders = []
    for check in checks:
        own = rank_environment(wanted.world, check.node.interface, wanted.environment, wanted.users)
        orders.append(({**own, **shared, "RANK": str(check.node_rank), "LOCAL_RANK": "0"}, _REHEARSAL_SECONDS))
    for check, wrong in zip(checks, nodes.ask("rehearse", orders, _REHEARSAL_SECONDS + _GRACE_SECONDS), strict=True):
        if wrong:
            text = (
                f"a small all-reduce over {check.node.interface} with {wanted.world.backend} failed: {wrong}: "
                "open TCP between the nodes, or name the interface in cluster.env"
            )
            check.problems.append(NodeProblem(FailureCode.NETWORK, text))
