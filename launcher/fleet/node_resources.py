"""The resources that a run takes of each node, compared with what the nodes of a Ray have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launcher.plan.schema import World


@dataclass(frozen=True)
class NodeResources:
    """The number of nodes of a run, the CPUs and GPUs it takes of each, and how many spare nodes it wants."""

    nodes: int
    cpus: int
    gpus: int
    spares: int = 0

    @classmethod
    def of(cls, world: World, spares: int = 0) -> NodeResources:
        """One CPU per rank, and one GPU if ranks use GPUs."""
        processes = world.processes_per_node
        return cls(world.nodes, cpus=processes, gpus=processes if world.device == "cuda" else 0, spares=spares)

    def bundle(self) -> dict[str, float]:
        return {"CPU": self.cpus, "GPU": self.gpus} if self.gpus else {"CPU": self.cpus}


def describe_shortage(
    resources: NodeResources, nodes: Sequence[tuple[Mapping[str, float], Mapping[str, float]]]
) -> str:
    """Compares the request with each node's (total, free) resources, and names what large enough nodes lack."""
    wanted = resources.bundle()
    large = [(has, free) for has, free in nodes if holds(has, wanted)]
    ready = [free for _, free in large if holds(free, wanted)]
    text = f"{describe_request(resources)}; nodes in this Ray: {len(nodes)}, large enough: {len(large)}, "
    text += f"with enough free now: {len(ready)}"
    for key, value in wanted.items():
        short = [free.get(key, 0) for _, free in large if free.get(key, 0) < value]
        if short:
            text += f"; {key}: too few free on {len(short)} nodes, at most {max(short):g}"
    return text


def describe_request(resources: NodeResources) -> str:
    """Describes the request: "asked for 2 nodes with 8 CPU and 8 GPU each"."""
    each = " and ".join(f"{value:g} {key}" for key, value in resources.bundle().items())
    return f"asked for {resources.nodes} node{'s' if resources.nodes > 1 else ''} with {each} each"


def holds(found: Mapping[str, float], wanted: Mapping[str, float]) -> bool:
    """Whether the found resources include the wanted ones."""
    return all(found.get(key, 0) >= value for key, value in wanted.items())
