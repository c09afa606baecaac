"""The nodes of a run: their agents, which start ranks and report on them, and nodes that are lost."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher.errors import FailureCode, RunFailed, first_line
from launcher.fleet.agent import NodeTask
from launcher.fleet.agent_calls import ANSWER_SECONDS, call_agents
from launcher.fleet.answer_times import LOST_SECONDS, POLL_SECONDS, AnswerTimes
from launcher.fleet.network import LOOPBACK
from launcher.fleet.node import Node
from launcher.fleet.node_network import with_clock_offsets, with_interfaces
from launcher.fleet.node_resources import NodeResources
from launcher.fleet.placement import Placement, wait_for_free
from launcher.fleet.ray_connection import RayConnection
from launcher.fleet.stacks import RankStack
from launcher.plan.schema import Plan
from launcher.records import NodeLostReport, Order, Report

__all__ = ["GRACE_SECONDS", "Node", "Nodes", "address_of"]

Log = Callable[[str], None]
_REACH_SECONDS = 10.0
_TOKENISE_SECONDS = 12 * 3600.0
_STACKS_SECONDS = 60.0
GRACE_SECONDS = 5.0
"""How long ranks may take to end after SIGTERM, if nothing else is decided."""


class Nodes:
    """A Ray cluster, started or joined, and the nodes of the run on it."""

    def __init__(self, resources: NodeResources, log: Log) -> None:
        self._resources, self._log = resources, log
        self._ray, self._placement = RayConnection(log), Placement(log)
        self.nodes: list[Node] = []
        self._pending: dict[Any, int] = {}
        self._attempt = 1
        self._answer_times = AnswerTimes(log)

    def connect(self, address: str) -> None:
        """Joins the Ray at `address`, or starts one for "local". Raises RunFailed."""
        if address == "local":
            # Ray prestarts a worker process per CPU, and the agent is the only worker here.
            self._resources = replace(self._resources, cpus=1)
        self._ray.connect(address, self._resources)

    def restart_own_ray(self) -> None:
        """Ends a Ray that was started here, after the loss of its only node: `connect` starts another."""
        if self._ray.own:
            self.give_up()
            self._ray.end_own()

    def place(self, wait_seconds: float) -> list[Node]:
        """Places one agent per node; returns the nodes in a stable order. Raises RunFailed with what is missing.

        Nodes that were placed before are kept if all their agents answer.
        """
        if len(self.nodes) == self._resources.nodes and self.all_answer():
            return self.nodes
        self.give_up()
        self.nodes = self._placement.place(self._resources, wait_seconds)
        if len(self.nodes) > 1:
            self.nodes = with_clock_offsets(with_interfaces(self.nodes))
        elif self._ray.own and self.nodes[0].address != LOOPBACK:
            self._log("          note: this Ray listens on all interfaces of this machine; its token protects it")
        return self.nodes

    def wait_for_free(self, wanted: int, at_least: int, wait_seconds: float) -> int:
        """Waits for free nodes for `wanted` agents; see `placement.wait_for_free`."""
        return wait_for_free(self._resources, wanted, at_least, wait_seconds, self._log)

    def resize(self, resources: NodeResources) -> None:
        """Changes the request for the next `place`. A Ray of our own has one node, and never changes."""
        self._resources = resources

    def all_answer(self) -> bool:
        """Whether there are nodes, and every agent answers."""
        if not self.nodes:
            return False
        import ray

        calls = [node.agent.clock.remote() for node in self.nodes]
        ready, _ = ray.wait(calls, num_returns=len(calls), timeout=_REACH_SECONDS)
        try:
            return len(ray.get(ready)) == len(calls)
        except ray.exceptions.RayError:
            return False

    def give_up(self) -> None:
        """Ends the agents, and gives their resources back to Ray."""
        self._placement.remove(self.nodes)
        self.nodes, self._pending = [], {}
        self._answer_times.begin(0)

    def ask(self, method: str, arguments: Sequence[tuple[Any, ...]], seconds: float = ANSWER_SECONDS) -> list[Any]:
        """Calls `method` of every agent, each with its own arguments; returns the answers in the order of nodes."""
        return call_agents(self.nodes, method, arguments, seconds)

    def tokenise_where_missing(self, plan: Plan, paths: list[str]) -> None:
        """Makes each node that does not see all of the paths tokenise the plan's data itself. Raises RunFailed."""
        without = [node for node, missing in zip(self.nodes, self.missing_paths(paths), strict=True) if missing]
        if not without:
            return
        hosts = ", ".join(node.host for node in without)
        self._log(f"          tokenising on {hosts} too: these nodes do not see the tokenised data")
        order = (plan.to_json(), str(Path.cwd()))
        answers = call_agents(without, "tokenise_data", [order] * len(without), _TOKENISE_SECONDS)
        failed = [f"{node.host}: {answer}" for node, answer in zip(without, answers, strict=True) if answer]
        if failed:
            raise RunFailed(f"the data could not be tokenised on every node: {'; '.join(failed)}")

    def missing_paths(self, paths: list[str]) -> list[list[str]]:
        """For every node, those of the paths that it does not see."""
        return self.ask("missing_paths", [(paths,)] * len(self.nodes))

    def check_visible(self, paths: list[str]) -> None:
        """Raises RunFailed if a node does not see one of the paths; names the nodes and paths."""
        found = [
            f"node {rank} ({node.host}) does not see {', '.join(missing)}"
            for rank, (node, missing) in enumerate(zip(self.nodes, self.missing_paths(paths), strict=True))
            if missing
        ]
        if found:
            message = f"{'; '.join(found)}: it must be on storage that all nodes share"
            raise RunFailed(message, code=FailureCode.NOT_SHARED)

    def start(self, tasks: list[NodeTask]) -> None:
        """Starts the ranks of every node; the task at index k is for node rank k."""
        self._attempt, self._pending = tasks[0].attempt, {}
        self._answer_times.begin(len(self.nodes))
        self.ask("start", [(task,) for task in tasks])

    def free_port(self, node_rank: int) -> int:
        """A TCP port that is free on the node at this moment."""
        port: int = call_agents([self.nodes[node_rank]], "free_port", [()])[0]
        return port

    def order(self, order: Order) -> None:
        """Sends an order to every rank."""
        self.ask("order", [(order,)] * len(self.nodes))

    def reports(self, timeout_seconds: float) -> list[Report]:
        """The reports of the ranks, each with its `node_rank`, and a report "node-lost" for a lost node."""
        import ray

        for index, node in enumerate(self.nodes):
            if index not in self._pending.values():
                self._pending[node.agent.next_reports.remote(POLL_SECONDS, self._attempt)] = index
        ready, _ = ray.wait(list(self._pending), num_returns=len(self._pending), timeout=timeout_seconds)
        found: list[Report] = []
        for reference in ready:
            index = self._pending.pop(reference)
            self._answer_times.answered(index)
            try:
                for report in ray.get(reference):
                    report["node_rank"] = index
                    found.append(report)
            except ray.exceptions.RayActorError as error:
                message = first_line(error)
                self._answer_times.lost.add(index)
                found.append(_node_lost(index, message))
        for index in self._answer_times.check(time.monotonic(), [node.host for node in self.nodes]):
            found.append(_node_lost(index, f"no answer for {LOST_SECONDS:.0f} s"))
        return found

    def stacks(self) -> tuple[list[RankStack], list[int]]:
        """The stacks of all ranks, which agents write to stacks.txt; and the node ranks whose agent did not answer."""
        import ray

        calls = [node.agent.stacks.remote() for node in self.nodes]
        ray.wait(calls, num_returns=len(calls), timeout=_STACKS_SECONDS)
        found: list[RankStack] = []
        absent: list[int] = []
        for node_rank, call in enumerate(calls):
            try:
                found += ray.get(call, timeout=0)
            except ray.exceptions.RayError:
                absent.append(node_rank)
        return found, absent

    def end(self, grace_seconds: float) -> None:
        """Ends every rank on every node that still answers."""
        if not self.nodes:
            return
        import ray

        with contextlib.suppress(ray.exceptions.RayError):
            nodes = [node for index, node in enumerate(self.nodes) if index not in self._answer_times.lost]
            endings = [node.agent.end.remote(grace_seconds) for node in nodes]
            ray.wait(endings, num_returns=len(endings), timeout=grace_seconds + 15)

    def close(self) -> None:
        """Releases the nodes, and ends the Ray if it was started here."""
        import ray

        if ray.is_initialized():
            self.give_up()
        self._ray.close()


def _node_lost(node_rank: int, message: str) -> NodeLostReport:
    return NodeLostReport(report="node-lost", node_rank=node_rank, time=time.time(), message=message)


def address_of(setting: str) -> str:
    """The Ray address of a job's `cluster.address`."""
    return os.environ.get("RAY_ADDRESS", "local") if setting == "auto" else setting
