"""Placing agents on nodes of a Ray: a placement group with one agent in each of its bundles."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from launcher.errors import FailureCode, RunFailed
from launcher.files import keep_private
from launcher.fleet.agent_calls import answers
from launcher.fleet.draining import draining_nodes
from launcher.fleet.node import Node
from launcher.fleet.node_resources import NodeResources, describe_request, describe_shortage, holds
from launcher.fleet.ray_settings import NODE_LABEL

FREED_SECONDS = 10.0
"""How long Ray may take to free the resources of agents that were ended."""


@dataclass(frozen=True)
class _Starting:
    """An agent that starts, and its answers: the node's facts, and the id of the node in Ray."""

    agent: Any
    facts: Any
    ray_node: Any


class Placement:
    """The placement group of a run, and the agents in its bundles: one on every node and every spare node.

    When Ray loses a node, it places the node's bundle on a free node as soon as there is one, and keeps the others;
    `refill` starts an agent there.
    """

    def __init__(self, log: Callable[[str], None]) -> None:
        self._log = log
        self._group: Any = None
        self._request: NodeResources | None = None
        self._agents: dict[int, tuple[Any, str]] = {}
        self._starting: dict[int, _Starting] = {}
        self._lost_on: dict[int, str] = {}
        self._unused: set[int] = set()

    @property
    def size(self) -> int:
        """The number of bundles in which agents may be."""
        return (self._request.nodes if self._request else 0) - len(self._unused)

    def place(self, request: NodeResources, wait_seconds: float, excluded: Collection[str]) -> list[Node]:
        """Places one agent on each of `request.nodes` nodes, none on an excluded host.

        Returns the nodes in a stable order. Raises RunFailed with what is missing.
        """
        from ray.util.placement_group import placement_group

        self._request, count = request, request.nodes
        selector = _not_on(excluded) if excluded else {}
        options = {"bundle_label_selector": [selector] * count} if selector else {}
        self._group = placement_group([request.bundle()] * count, strategy="STRICT_SPREAD", **options)
        self._wait_for_group(request, wait_seconds, excluded)
        starting = {index: self._start_agent(index) for index in range(count)}
        # All start before the first answer is awaited.
        answers([each.facts for each in starting.values()])
        return [node for _, node in sorted((self._add(index, each) for index, each in starting.items()), key=_sort_key)]

    def refill(self) -> None:
        """Starts an agent in each bundle that has none; see `arrived`. Returns at once."""
        for index in range(self._request.nodes if self._request else 0):
            if index not in self._agents and index not in self._starting and index not in self._unused:
                self._starting[index] = self._start_agent(index)

    def arrived(self, timeout_seconds: float) -> list[Node]:
        """The nodes of agents that `refill` started and that answer now; waits for the first one."""
        import ray

        indices = {each.facts: index for index, each in self._starting.items()}
        ready, _ = ray.wait(list(indices), num_returns=1, timeout=timeout_seconds) if indices else ([], [])
        if ready:
            ready, _ = ray.wait(list(indices), num_returns=len(indices), timeout=0)
        found = []
        for reference in ready:
            index = indices[reference]
            with contextlib.suppress(RunFailed, ray.exceptions.RayError):
                found.append(self._add(index, self._starting[index])[1])
            del self._starting[index]
        return found

    def returned(self) -> bool:
        """Whether Ray has placed a bundle of a lost node on another node, where an agent is starting."""
        from ray.util.placement_group import placement_group_table

        alive = {node["NodeID"] for node in live_nodes()}
        now = placement_group_table(self._group)["bundles_to_node_id"] if self._starting else {}
        return any(now.get(i) in alive and now[i] != self._lost_on.get(i) for i in self._starting)

    def drained(self) -> list[Any]:
        """The agents on nodes that Ray drains: it places nothing there any more."""
        nodes = draining_nodes() if self._agents else {}
        return [agent for agent, ray_node in self._agents.values() if ray_node in nodes]

    def drop(self, node: Node, *, kept: bool) -> None:
        """Ends the agent of a node that does not answer, or that must not be used any more.

        `kept`: the node still runs, so Ray does not place its bundle elsewhere.
        """
        import ray

        for index in [index for index, (agent, _) in self._agents.items() if agent is node.agent]:
            self._lost_on[index] = self._agents.pop(index)[1]
            if kept:
                self._unused.add(index)
        with contextlib.suppress(Exception):
            ray.kill(node.agent)

    def remove(self) -> None:
        """Ends all agents, and gives their resources back to Ray."""
        import ray

        with contextlib.suppress(Exception):
            for agent in [agent for agent, _ in self._agents.values()] + [
                each.agent for each in self._starting.values()
            ]:
                ray.kill(agent)
            if self._group is not None:
                ray.util.remove_placement_group(self._group)
        self.forget()

    def forget(self) -> None:
        """Forgets all agents, as after the end of their Ray."""
        self._group, self._request = None, None
        self._agents, self._starting, self._lost_on, self._unused = {}, {}, {}, set()

    def _start_agent(self, index: int) -> _Starting:
        """Starts an agent in a bundle. Ray starts it once the bundle is placed."""
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        assert self._request is not None
        strategy = PlacementGroupSchedulingStrategy(placement_group=self._group, placement_group_bundle_index=index)
        options = {"num_cpus": self._request.cpus, "num_gpus": self._request.gpus, "max_concurrency": 4}
        agent = ray.remote(_agent_class()).options(scheduling_strategy=strategy, **options).remote()
        return _Starting(agent, agent.describe.remote(), agent.ray_node_id.remote())

    def _add(self, index: int, starting: _Starting) -> tuple[dict[str, Any], Node]:
        """Keeps an agent that has started; returns what Ray knows of its node, and the node. Raises RunFailed."""
        import ray

        facts, ray_node = answers([starting.facts, starting.ray_node])
        known = next(node for node in ray.nodes() if node["NodeID"] == ray_node)
        self._agents[index] = (starting.agent, ray_node)
        self._lost_on.pop(index, None)
        return known, Node(starting.agent, facts["host"], known["NodeManagerAddress"], tuple(facts["gpus"]))

    def _wait_for_group(self, request: NodeResources, wait_seconds: float, excluded: Collection[str]) -> None:
        deadline, logged = time.monotonic() + wait_seconds, False
        while not self._group.wait(timeout_seconds=1 if not logged else 5):
            missing = missing_nodes(request, excluded)
            if not logged:
                self._log(f"waiting up to {wait_seconds:.0f} s for nodes: {missing}")
                logged = True
            if time.monotonic() > deadline:
                message = f"after {wait_seconds:.0f} s there are not enough free nodes: {missing}"
                raise RunFailed(message, code=FailureCode.NOT_ENOUGH_NODES)


def free_nodes(request: NodeResources, excluded: Collection[str]) -> int:
    """The number of live nodes with enough free resources for an agent; as many as requested if this is unknown."""
    found = _resources_of_nodes(excluded)
    if found is None:
        return request.nodes
    return sum(holds(free, request.bundle()) for _, free in found)


def wait_for_free(request: NodeResources, wanted: int, wait_seconds: float, excluded: Collection[str]) -> int:
    """Waits for free nodes for `wanted` agents, at most; returns how many there are.

    Agents of an earlier attempt must be ended before.
    """
    deadline = time.monotonic() + max(wait_seconds, FREED_SECONDS)
    while (found := free_nodes(request, excluded)) < wanted and time.monotonic() < deadline:
        time.sleep(1.0)
    return min(found, wanted)


def missing_nodes(request: NodeResources, excluded: Collection[str] = ()) -> str:
    """Describes what was requested and what the cluster has."""
    import ray

    found = _resources_of_nodes(excluded)
    if found is None:
        text = f"{describe_request(request)}; Ray {ray.__version__} does not report what is free on each node"
    else:
        text = describe_shortage(request, found)
    unused = sorted({node["NodeManagerHostname"] for node in live_nodes()} & set(excluded)) if excluded else []
    return f"{text}; excluded: {', '.join(unused)}" if unused else text


def live_nodes() -> list[dict[str, Any]]:
    """What Ray knows of each live node."""
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def _resources_of_nodes(excluded: Collection[str]) -> list[tuple[dict[str, float], dict[str, float]]] | None:
    """The (total, free) resources of every live node that is not excluded or drained; None if Ray reports none."""
    try:
        # Ray's public API reports free resources only in total, not per node.
        from ray._private.state import available_resources_per_node
    except ImportError:
        return None
    free, drained = available_resources_per_node(), draining_nodes()
    nodes = [node for node in live_nodes() if node["NodeManagerHostname"] not in excluded]
    return [(node["Resources"], free.get(node["NodeID"], {})) for node in nodes if node["NodeID"] not in drained]


def _not_on(excluded: Collection[str]) -> dict[str, str]:
    """A label selector of Ray that leaves out the excluded hosts which are in the cluster now."""
    ids = [node["NodeID"] for node in live_nodes() if node["NodeManagerHostname"] in excluded]
    return {"ray.io/node-id": f"!in({','.join(ids)})"} if ids else {}


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
