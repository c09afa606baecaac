"""The nodes of a run: their agents, which start ranks and report on them, and nodes that are lost."""

from __future__ import annotations

import contextlib
import copy
import os
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.markup import escape

from launcher.errors import FailureCode, RunFailed, first_line
from launcher.fleet.agent import NodeTask
from launcher.fleet.agent_calls import ANSWER_SECONDS, answers, call_agents
from launcher.fleet.answer_times import LOST_SECONDS, POLL_SECONDS, AnswerTimes
from launcher.fleet.forks import READY_SECONDS, ForkServer
from launcher.fleet.network import LOOPBACK
from launcher.fleet.node import Node, fill_places
from launcher.fleet.node_network import with_clock_offsets, with_interfaces
from launcher.fleet.node_resources import NodeResources
from launcher.fleet.placement import FREED_SECONDS, Placement, free_nodes, wait_for_free
from launcher.fleet.ray_connection import RayConnection
from launcher.fleet.spare_watch import SpareWatch
from launcher.fleet.stacks import RankStack
from launcher.plan.schema import Plan
from launcher.records import NodeLostReport, Order, Report

__all__ = ["GRACE_SECONDS", "Node", "Nodes", "address_of"]

Log = Callable[[str], None]
_REACH_SECONDS, _LOST_REACH_SECONDS = 10.0, 1.0
_REFILL_SECONDS = 10.0
_START_SECONDS = 60.0
"""How long an agent may take to start on a node that has returned."""
_TOKENISE_SECONDS = 12 * 3600.0
_STACKS_SECONDS = 60.0
GRACE_SECONDS = 5.0
"""How long ranks may take to end after SIGTERM, if nothing else is decided."""


class Nodes:
    """A Ray cluster, started or joined, and the nodes of the run on it.

    `nodes` have ranks; `spares` only have agents, and take the places of nodes that are lost. Hosts in `excluded` are
    not used, each for the given reason.
    """

    def __init__(self, resources: NodeResources, log: Log, offered: ForkServer | None = None) -> None:
        """`offered` is a fork server on this machine, for an agent that is placed here."""
        self._resources, self._log, self._offered = resources, log, offered
        self._ray, self._placement = RayConnection(log), Placement(log)
        self.nodes: list[Node] = []
        self.spares: list[Node] = []
        self.excluded: dict[str, str] = {}
        self._placed_before = False
        self._measured_agents: list[Any] = []
        self._pending: dict[Any, int] = {}
        self._spare_watch, self._next_refill = SpareWatch(), 0.0
        self._attempt = 1
        self._answer_times = AnswerTimes(log)

    def connect(self, address: str) -> None:
        """Joins the Ray at `address`, or starts one for "local". Raises RunFailed."""
        if address == "local":
            # Ray prestarts a worker process per CPU, and the agent is the only worker here.
            self._resources = replace(self._resources, cpus=1)
        self._ray.connect(address, self._resources)

    @property
    def own_ray(self) -> bool:
        """Whether the Ray was started here."""
        return self._ray.own

    def restart_own_ray(self) -> None:
        """Ends a Ray that was started here, after the loss of its head or only node: `connect` starts another."""
        if self.own_ray:
            # First of all, with the agents: a call to a Ray without its head blocks until Ray ends this process.
            self._ray.end_own()
            self._placement.forget()
            self._forget_agents()

    def place(self, wait_seconds: float) -> list[Node]:
        """Places one agent per node and spare node; returns the nodes. Raises RunFailed with what is missing.

        Nodes that were placed before are kept if their agents answer, and spare nodes take the places of others. The
        first time, it waits for the spare nodes too. The nodes of a new placement are in a stable order.
        """
        wanted = self._resources.nodes
        if self._count() and self.ready(wanted, wanted, wait_seconds) < wanted:
            self.give_up()
            # It has waited for other nodes already.
            wait_seconds = FREED_SECONDS
        if not self._count():
            self.nodes = self._place_all(wait_seconds)
            self._placed_before = True
        pool = [*self.nodes, *self.spares]
        if (agents := [node.agent for node in pool]) != self._measured_agents:
            pool, self._measured_agents = self._measured(pool), agents
        self.nodes, self.spares = pool[:wanted], pool[wanted:]
        return self.nodes

    def ready(self, wanted: int, at_least: int, wait_seconds: float) -> int:
        """How many nodes the next attempt can have, at most `wanted`; waits for them up to `wait_seconds`.

        Nodes that do not answer, are excluded or are drained by Ray are given up, and spare nodes take their places. If
        fewer than `at_least` are ready, all are given up, and the result is the number of nodes that can be placed.
        """
        drained = self._drop_unusable()
        self._placement.refill()
        self._take_in(self._placement.arrived(0.0))
        self._wait_for_agents(wanted, wait_seconds)
        if (found := self._count()) >= wanted:
            return wanted
        # Ray itself replaces a lost node, but not an excluded or drained one.
        replaceable = self._placement.size < wanted
        if found >= at_least and not (replaceable and (drained or self._free_elsewhere(self.excluded))):
            return found
        self.give_up()
        return wait_for_free(self._resources, wanted, wait_seconds if replaceable else 0.0, self.excluded)

    def resize(self, resources: NodeResources) -> None:
        """Changes the request for the next `place`. A Ray of our own has one node, and never changes."""
        self._resources = resources

    def exclude(self, host: str, reason: str) -> None:
        """The host is not used any more from the next `ready` or `place` on."""
        self.excluded[host] = reason

    def can_do_without(self, host: str, at_least: int) -> bool:
        """Whether there are `at_least` nodes without the host: those of the run, its spare nodes, and free ones."""
        left = sum(node.host != host and node.host not in self.excluded for node in (*self.nodes, *self.spares))
        return left >= at_least or left + self._free_elsewhere({host, *self.excluded}) >= at_least

    def with_spares(self) -> Nodes:
        """The same nodes with the spare nodes at the end, for checks of all of them."""
        both = copy.copy(self)
        both.nodes = [*self.nodes, *self.spares]
        return both

    def _free_elsewhere(self, excluded: Collection[str]) -> int:
        """The number of free nodes without an agent of the run, which may leave something free on its node."""
        return free_nodes(self._resources, {*excluded, *(node.host for node in (*self.nodes, *self.spares))})

    def _count(self) -> int:
        return len(self.nodes) + len(self.spares)

    def _take_in(self, arrived: list[Node]) -> None:
        """Adds nodes on which an agent has started; gives up excluded ones."""
        for node in arrived:
            if node.host in self.excluded:
                self._placement.drop(node, kept=True)
            else:
                self.spares.append(node)

    def _drop_unusable(self) -> bool:
        """Gives up nodes that do not answer, are excluded or are drained, and puts spare nodes in their places.

        Returns whether there were drained nodes.
        """
        answering, drained = self._answering(), self._placement.drained()
        usable = [node for node in answering if node.host not in self.excluded and node.agent not in drained]
        for node in (*self.nodes, *self.spares):
            if node not in usable:
                self._placement.drop(node, kept=node in answering)
        before, (self.nodes, self.spares) = self.nodes, fill_places(self.nodes, self.spares, usable)
        self._answer_times.begin(len(self.nodes))
        for old, new in zip(before, self.nodes, strict=False):
            if new not in before:
                self._log(f"          spare node {new.host} takes the place of {old.host}")
        return bool(drained)

    def _wait_for_agents(self, wanted: int, wait_seconds: float) -> None:
        """Waits for agents on nodes that return or become free. Agents that are already starting may take longer."""
        began, logged = time.monotonic(), False
        while self._count() < min(wanted, self._placement.size):
            waited = time.monotonic() - began
            if waited >= max(wait_seconds, _START_SECONDS if self._placement.returned() else FREED_SECONDS):
                return
            if not logged and wait_seconds > FREED_SECONDS:
                ready = f"{self._count()} of {wanted} nodes are ready"
                self._log(f"          {ready}; waiting up to {wait_seconds:.0f} s for the others")
                logged = True
            self._take_in(self._placement.arrived(1.0))
            self._placement.refill()

    def _place_all(self, wait_seconds: float) -> list[Node]:
        """Places all agents, where none is placed; the spare nodes are at the end. Raises RunFailed."""
        request = self._resources
        usable = free_nodes(request, self.excluded)
        count = request.nodes + request.spares
        if self._placed_before or self.excluded:
            # A restart does not wait for spare nodes, nor a run that knows why one is missing.
            count = max(request.nodes, min(usable, count))
        try:
            return self._placement.place(replace(request, nodes=count), wait_seconds, self.excluded)
        except RunFailed as error:
            usable = min(free_nodes(request, self.excluded), count)
            if error.code is not FailureCode.NOT_ENOUGH_NODES or not request.nodes <= usable < count:
                raise
        found = usable - request.nodes
        self._log(f"          only {found} of {request.spares} spare nodes are free: starting without the others")
        self._placement.remove()
        return self._placement.place(replace(request, nodes=usable), FREED_SECONDS, self.excluded)

    def _measured(self, pool: list[Node]) -> list[Node]:
        """The nodes with their interfaces and clocks, if there are several. Raises RunFailed."""
        if len(pool) > 1:
            return with_clock_offsets(with_interfaces(pool))
        if self._ray.own and pool[0].address != LOOPBACK:
            self._log("          note: this Ray listens on all interfaces of this machine; its token protects it")
        return pool

    def _answering(self) -> list[Node]:
        """The nodes and spare nodes whose agents answer. A node that is known to be lost must answer at once."""
        import ray

        calls = {node.agent.clock.remote(): node for node in (*self.nodes, *self.spares)}
        lost = [self.nodes[index].agent for index in self._answer_times.lost]
        awaited = [call for call, node in calls.items() if node.agent not in lost]
        if not calls:
            return []
        if awaited:
            ray.wait(awaited, num_returns=len(awaited), timeout=_REACH_SECONDS)
        ready, _ = ray.wait(list(calls), num_returns=len(calls), timeout=_LOST_REACH_SECONDS)
        found = []
        for call in ready:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.get(call)
                found.append(calls[call])
        return found

    def give_up(self) -> None:
        """Ends the agents, and gives their resources back to Ray."""
        self._placement.remove()
        self._forget_agents()

    def _forget_agents(self) -> None:
        self.nodes, self.spares, self._pending = [], [], {}
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
        found = call_agents(without, "tokenise_data", [order] * len(without), _TOKENISE_SECONDS)
        failed = [f"{node.host}: {answer}" for node, answer in zip(without, found, strict=True) if answer]
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

    def exclude_blind_spares(self, paths: list[str]) -> None:
        """Excludes the spare nodes that do not see all of the paths."""
        found = call_agents(self.spares, "missing_paths", [(paths,)] * len(self.spares))
        for node, missing in zip(self.spares, found, strict=True):
            if missing:
                self.exclude(node.host, f"it does not see {', '.join(missing)}")
                self._log(f"          spare node {node.host} cannot be used: {self.excluded[node.host]}")

    def start(self, tasks: list[NodeTask]) -> None:
        """Starts the ranks of every node; the task at index k is for node rank k. Waits until they can be forked."""
        self._attempt, self._pending = tasks[0].attempt, {}
        self._answer_times.begin(len(self.nodes))
        self.ask("start", [(task,) for task in tasks], READY_SECONDS + ANSWER_SECONDS)

    def prepare_forks(self, tasks: Sequence[NodeTask]) -> None:
        """Begins the imports of the ranks of every node in a process that forks them; returns meanwhile."""
        self.ask("prepare_forks", [(task, self._offered) for task in tasks])

    def reserve_port(self, address: str, *, listen: bool) -> int:
        """A TCP port of an address of the first node, which its agent holds until `start`."""
        port: int = answers([self.nodes[0].agent.reserve_port.remote(address, listen=listen)], self.nodes[:1])[0]
        return port

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
        self._watch_spares()
        return found

    def _watch_spares(self) -> None:
        """Reports spare nodes that are lost, and nodes that are available again. Waits for nothing."""
        for node, why in self._spare_watch.lost(self.spares):
            self._log(f"          spare node {node.host} is lost: {escape(why)}")
            self.spares.remove(node)
            self._placement.drop(node, kept=False)
        if time.monotonic() >= self._next_refill:
            # Again and again: an agent that Ray starts on a node before it counts it as dead never answers.
            self._next_refill = time.monotonic() + _REFILL_SECONDS
            self._placement.refill()
        before = list(self.spares)
        self._take_in(self._placement.arrived(0.0))
        for node in self.spares:
            if node not in before:
                self._log(f"          {node.host} is ready for the next restart")

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
