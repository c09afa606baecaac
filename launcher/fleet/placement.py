"""Placing agents on nodes of a Ray: a placement group with one agent in each of its bundles."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable
from typing import Any

from launcher.errors import FailureCode, RunFailed
from launcher.files import keep_private
from launcher.fleet.agent_calls import answers
from launcher.fleet.node import Node
from launcher.fleet.node_resources import NodeResources, describe_request, describe_shortage, holds
from launcher.fleet.ray_settings import NODE_LABEL

_FREED_SECONDS = 10.0
"""How long Ray may take to free the resources of agents that were ended."""


class Placement:
    """The placement group of a run, of exactly the requested size, and its agents."""

    def __init__(self, log: Callable[[str], None]) -> None:
        self._log = log
        self._group: Any = None

    def place(self, resources: NodeResources, wait_seconds: float) -> list[Node]:
        """Places one agent per node; returns the nodes in a stable order. Raises RunFailed with what is missing."""
        import ray
        from ray.util.placement_group import placement_group

        self._group = placement_group([resources.bundle()] * resources.nodes, strategy="STRICT_SPREAD")
        self._wait_for_group(resources, wait_seconds)
        agents = [_start_agent(self._group, index, resources) for index in range(resources.nodes)]
        found = answers([agent.describe.remote() for agent in agents])
        ids = answers([agent.ray_node_id.remote() for agent in agents])
        known = {node["NodeID"]: node for node in ray.nodes()}
        placed = [
            (known[node_id], Node(agent, facts["host"], known[node_id]["NodeManagerAddress"], tuple(facts["gpus"])))
            for agent, facts, node_id in zip(agents, found, ids, strict=True)
        ]
        return [node for _, node in sorted(placed, key=_sort_key)]

    def remove(self, nodes: Iterable[Node]) -> None:
        """Ends the agents, and gives their resources back to Ray."""
        import ray

        with contextlib.suppress(Exception):
            for node in nodes:
                ray.kill(node.agent)
            if self._group is not None:
                ray.util.remove_placement_group(self._group)
        self._group = None

    def _wait_for_group(self, resources: NodeResources, wait_seconds: float) -> None:
        deadline, logged = time.monotonic() + wait_seconds, False
        while not self._group.wait(timeout_seconds=1 if not logged else 5):
            missing = missing_nodes(resources)
            if not logged:
                self._log(f"waiting up to {wait_seconds:.0f} s for nodes: {missing}")
                logged = True
            if time.monotonic() > deadline:
                message = f"after {wait_seconds:.0f} s there are not enough free nodes: {missing}"
                raise RunFailed(message, code=FailureCode.NOT_ENOUGH_NODES)


def wait_for_free(
    resources: NodeResources, wanted: int, at_least: int, wait_seconds: float, log: Callable[[str], None]
) -> int:
    """Waits for free nodes for `wanted` agents; returns how many there are, which may be fewer than `at_least`.

    Agents of an earlier attempt must be ended before. `wanted` is waited for up to `wait_seconds`.
    """
    deadline = time.monotonic() + max(wait_seconds, _FREED_SECONDS)
    logged = False
    while (found := _free_nodes(resources)) < wanted and time.monotonic() < deadline:
        if not logged and found >= at_least and wait_seconds > _FREED_SECONDS:
            log(f"          {found} of {wanted} nodes are free; waiting up to {wait_seconds:.0f} s for the others")
            logged = True
        time.sleep(1.0)
    return min(found, wanted)


def missing_nodes(resources: NodeResources) -> str:
    """Describes what was requested and what the cluster has."""
    import ray

    found = _resources_of_nodes()
    if found is None:
        return f"{describe_request(resources)}; Ray {ray.__version__} does not report what is free on each node"
    return describe_shortage(resources, found)


def _free_nodes(resources: NodeResources) -> int:
    """The number of live nodes that have enough free resources for an agent; all that are wanted if unknown."""
    found = _resources_of_nodes()
    if found is None:
        return resources.nodes
    return sum(holds(free, resources.bundle()) for _, free in found)


def _resources_of_nodes() -> list[tuple[dict[str, float], dict[str, float]]] | None:
    """The (total, free) resources of every live node; None if this Ray does not report what is free on each."""
    import ray

    try:
        # Ray's public API reports free resources only in total, not per node.
        from ray._private.state import available_resources_per_node
    except ImportError:
        return None
    free = available_resources_per_node()
    return [(node["Resources"], free.get(node["NodeID"], {})) for node in ray.nodes() if node["Alive"]]


def _start_agent(group: Any, index: int, resources: NodeResources) -> Any:
    """Starts an agent in a bundle of the group."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    strategy = PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=index)
    options = {"num_cpus": resources.cpus, "num_gpus": resources.gpus, "max_concurrency": 4}
    return ray.remote(_agent_class()).options(scheduling_strategy=strategy, **options).remote()


def _agent_class() -> type:
    import ray

    from launcher.fleet.agent import Agent

    class RayAgent(Agent):
        """The agent as a Ray actor."""

        def __init__(self) -> None:
            # Only the run's owner may read what the agent and its ranks write.
            keep_private()
            super().__init__()

        def ray_node_id(self) -> str:
            return str(ray.get_runtime_context().get_node_id())

    return RayAgent


def _sort_key(placed: tuple[dict[str, Any], Node]) -> tuple[int, bool, list[int], str]:
    """Sorts nodes by the number in their label, if they have one, then by address.

    IPv4 addresses come first, by number; others follow, by text.
    """
    facts, node = placed
    parts = node.address.split(".")
    numeric = all(part.isdigit() for part in parts)
    number = int(facts.get("Labels", {}).get(NODE_LABEL, 0))
    return (number, not numeric, [int(part) for part in parts] if numeric else [], node.address)
