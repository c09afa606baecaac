"""The nodes of a run through Ray: one agent per node, in a placement group of exactly the requested size."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
from rich.markup import escape

from launcher.errors import FailureCode, RunFailed, code_of, first_line
from launcher.files import keep_private
from launcher.fleet.agent import NodeTask
from launcher.fleet.answer_times import LOST_SECONDS, POLL_SECONDS, AnswerTimes
from launcher.fleet.draining import draining_nodes
from launcher.fleet.forks import READY_SECONDS, ForkServer
from launcher.fleet.network import LOOPBACK
from launcher.fleet.node_resources import NodeResources, describe_request, describe_shortage, holds
from launcher.fleet.process import children, kill_all, signals_blocked, with_children
from launcher.fleet.ray_folder import RayFolder
from launcher.fleet.ray_settings import (
    LOOPBACK_ONLY,
    job_config,
    own_ray_variables,
    quiet_ray,
    restore_variables,
    use_token,
    write_token,
)
from launcher.fleet.stacks import RankStack
from launcher.plan.schema import Plan
from launcher.records import NodeLostReport, Order, Report

Log = Callable[[str], None]
_ANSWER_SECONDS = 120.0
OBJECT_STORE_BYTES = 100 * 1024**2
_REACH_SECONDS = 10.0
_TOKENISE_SECONDS = 12 * 3600.0
_CLOCK_ROUNDS = 3
_STACKS_SECONDS = 60.0
GRACE_SECONDS = 5.0
"""How long ranks may take to end after SIGTERM, if nothing else is decided."""
_FREED_SECONDS = 10.0
"""How long Ray may take to free the resources of agents that were ended."""
NODE_LABEL = "launcher-node"
"""The label with a node's number in a Ray started by `launcher node`."""


@dataclass(frozen=True)
class Node:
    """A node with its agent. Node rank 0 is the first of the list that `Nodes.place` returns."""

    agent: Any
    host: str
    address: str
    gpus: tuple[str, ...]
    interface: str | None = None
    clock_offset_seconds: float = 0.0


class Nodes:
    """A Ray cluster, started or joined, and the nodes of the run on it."""

    def __init__(self, resources: NodeResources, log: Log, offered: ForkServer | None = None) -> None:
        """`offered` is a fork server on this machine, for an agent that is placed here."""
        self._resources, self._log, self._offered = resources, log, offered
        self._group: Any = None
        self._folder: RayFolder | None = None
        self._variables: dict[str, str | None] = {}
        self.nodes: list[Node] = []
        self._pending: dict[Any, int] = {}
        self._attempt, self._connected = 1, False
        self._answer_times = AnswerTimes(log)
        self._ray_processes: set[psutil.Process] = set()

    def connect(self, address: str) -> None:
        """Joins the Ray at `address`, or starts one for "local", with a second try. Raises RunFailed.

        Does nothing if this is done already.
        """
        if self._connected:
            return
        quiet_ray()
        local = address == "local"
        if local:
            # Ray prestarts a worker process per CPU, and the agent is the only worker here.
            self._resources = replace(self._resources, cpus=1)
        options = self._local_ray() if local else {"address": address}
        options["job_config"] = job_config()
        for may_retry in (True, False) if local else (False,):
            before = children()
            try:
                _init_ray(options)
            except Exception as error:  # Ray's errors here have no common class
                # Ray ends its processes only when this process ends.
                kill_all(children() - before)
                if may_retry and not isinstance(error, TypeError | ValueError):
                    self._start_ray_again(error)
                    continue
                where = "could not start Ray on this machine" if local else f"could not connect to the Ray at {address}"
                raise RunFailed(f"{where}: {first_line(error)}", code=FailureCode.RAY_LOST) from None
            self._connected, self._ray_processes = True, children() - before
            return

    def _start_ray_again(self, error: Exception) -> None:
        """Prepares a second start of Ray, which on a busy machine may exceed its own time limits."""
        import ray

        self._log(f"          note: Ray did not start ({escape(first_line(error))}); starting it again")
        with contextlib.suppress(Exception):
            ray.shutdown()
        assert self._folder is not None
        shutil.rmtree(self._folder.ray, ignore_errors=True)

    @property
    def own_ray(self) -> bool:
        """Whether the Ray was started here."""
        return self._folder is not None

    def restart_own_ray(self) -> None:
        """Ends a Ray that was started here, after the loss of its head or only node: `connect` starts another."""
        if self._folder is None:
            return
        import ray

        # First of all, with the agents: a call to a Ray without its head blocks until Ray ends this process.
        kill_all(with_children(self._ray_processes))
        self._forget_agents()
        ray.shutdown()
        shutil.rmtree(self._folder.ray, ignore_errors=True)
        self._connected = False

    def _local_ray(self) -> dict[str, Any]:
        """Options for a Ray only on this machine, with the resources of the run and its own token."""
        if self._folder is None:
            self._folder, self._variables = RayFolder(), own_ray_variables()
            write_token(self._folder.token)
        use_token(self._folder.token)
        os.environ.update(LOOPBACK_ONLY)
        return {
            "address": "local",
            "num_cpus": self._resources.cpus,
            "num_gpus": self._resources.gpus,
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
            "_temp_dir": str(self._folder.ray),
            # When memory is nearly full, as with ZeRO's offload, Ray would kill its only worker, the agent.
            "_system_config": {"memory_monitor_refresh_ms": 0},
        }

    def place(self, wait_seconds: float) -> list[Node]:
        """Places one agent per node; returns the nodes in a stable order. Raises RunFailed with what is missing.

        Nodes that were placed before are kept if all their agents answer.
        """
        import ray
        from ray.util.placement_group import placement_group

        if len(self.nodes) == self._resources.nodes and self.all_answer():
            return self.nodes
        self.give_up()
        self._group = placement_group([self._resources.bundle()] * self._resources.nodes, strategy="STRICT_SPREAD")
        self._wait_for_group(wait_seconds)
        agents = [self._agent(index) for index in range(self._resources.nodes)]
        found = _answers([agent.describe.remote() for agent in agents])
        ids = _answers([agent.ray_node_id.remote() for agent in agents])
        known = {node["NodeID"]: node for node in ray.nodes()}
        placed = [
            (known[node_id], Node(agent, facts["host"], known[node_id]["NodeManagerAddress"], tuple(facts["gpus"])))
            for agent, facts, node_id in zip(agents, found, ids, strict=True)
        ]
        self.nodes = [node for _, node in sorted(placed, key=_sort_key)]
        if len(self.nodes) > 1:
            self._find_interfaces()
            self._compare_clocks()
        elif self._folder is not None and self.nodes[0].address != LOOPBACK:
            self._log("          note: this Ray listens on all interfaces of this machine; its token protects it")
        return self.nodes

    def wait_for_free(self, wanted: int, at_least: int, wait_seconds: float) -> int:
        """Waits for free nodes for `wanted` agents; returns how many there are, which may be fewer than `at_least`.

        Agents of an earlier attempt must be ended before. `wanted` is waited for up to `wait_seconds`.
        """
        deadline = time.monotonic() + max(wait_seconds, _FREED_SECONDS)
        logged = False
        while (found := self._free_nodes()) < wanted and time.monotonic() < deadline:
            if not logged and found >= at_least and wait_seconds > _FREED_SECONDS:
                self._log(
                    f"          {found} of {wanted} nodes are free; waiting up to {wait_seconds:.0f} s for the others"
                )
                logged = True
            time.sleep(1.0)
        return min(found, wanted)

    def resize(self, resources: NodeResources) -> None:
        """Changes the request for the next `place`. A Ray of our own has one node, and never changes."""
        self._resources = resources

    def _free_nodes(self) -> int:
        """The number of live nodes that have enough free resources for an agent; all that are wanted if unknown."""
        found = _resources_of_nodes()
        if found is None:
            return self._resources.nodes
        return sum(holds(free, self._resources.bundle()) for _, free in found)

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
        import ray

        with contextlib.suppress(Exception):
            for node in self.nodes:
                ray.kill(node.agent)
            if self._group is not None:
                ray.util.remove_placement_group(self._group)
        self._forget_agents()

    def _forget_agents(self) -> None:
        self.nodes, self._group, self._pending = [], None, {}
        self._answer_times.begin(0)

    def ask(self, method: str, arguments: Sequence[tuple[Any, ...]], seconds: float = _ANSWER_SECONDS) -> list[Any]:
        """Calls `method` of every agent, each with its own arguments; returns the answers in the order of nodes."""
        return self._ask_some(self.nodes, method, arguments, seconds)

    def tokenise_where_missing(self, plan: Plan, paths: list[str]) -> None:
        """Makes each node that does not see all of the paths tokenise the plan's data itself. Raises RunFailed."""
        without = [node for node, missing in zip(self.nodes, self.missing_paths(paths), strict=True) if missing]
        if not without:
            return
        hosts = ", ".join(node.host for node in without)
        self._log(f"          tokenising on {hosts} too: these nodes do not see the tokenised data")
        order = (plan.to_json(), str(Path.cwd()))
        answers = self._ask_some(without, "tokenise_data", [order] * len(without), _TOKENISE_SECONDS)
        failed = [f"{node.host}: {answer}" for node, answer in zip(without, answers, strict=True) if answer]
        if failed:
            raise RunFailed(f"the data could not be tokenised on every node: {'; '.join(failed)}")

    @staticmethod
    def _ask_some(
        nodes: list[Node], method: str, arguments: Sequence[tuple[Any, ...]], seconds: float = _ANSWER_SECONDS
    ) -> list[Any]:
        calls = [getattr(node.agent, method).remote(*given) for node, given in zip(nodes, arguments, strict=True)]
        return _answers(calls, nodes, seconds)

    def _find_interfaces(self) -> None:
        """Finds the interface of every node by connecting it to the first node. Raises RunFailed."""
        first, others = self.nodes[0], self.nodes[1:]
        port, interface = _answers(
            [first.agent.open_probe_port.remote(), first.agent.interface_of.remote(first.address)]
        )
        calls = [node.agent.reach.remote(first.address, port, _REACH_SECONDS) for node in others]
        found = _answers(calls, others)
        _answers([first.agent.close_probe_port.remote()])
        unreachable = [
            f"node {rank} ({node.host}) cannot connect to node 0 ({first.host}) at {first.address}: {reached}"
            for rank, (node, reached) in enumerate(zip(others, found, strict=True), start=1)
            if isinstance(reached, str)
        ]
        if unreachable:
            hint = "every node must reach every other node over TCP, at the address that Ray has for it"
            raise RunFailed(f"{'; '.join(unreachable)}\n  {hint}", code=FailureCode.NETWORK)
        rest = [replace(node, interface=reached.interface) for node, reached in zip(others, found, strict=True)]
        self.nodes = [replace(first, interface=interface), *rest]

    def _compare_clocks(self) -> None:
        """Measures how far every node's clock is ahead of this one's."""
        self.nodes = [replace(node, clock_offset_seconds=_clock_offset(node)) for node in self.nodes]

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
        """Starts the ranks of every node; the task at index k is for node rank k. Waits until they can be forked."""
        self._attempt, self._pending = tasks[0].attempt, {}
        self._answer_times.begin(len(self.nodes))
        self.ask("start", [(task,) for task in tasks], READY_SECONDS + _ANSWER_SECONDS)

    def prepare_forks(self, tasks: Sequence[NodeTask]) -> None:
        """Begins the imports of the ranks of every node in a process that forks them; returns meanwhile."""
        self.ask("prepare_forks", [(task, self._offered) for task in tasks])

    def reserve_port(self, address: str, *, listen: bool) -> int:
        """A TCP port of an address of the first node, which its agent holds until `start`."""
        port: int = _answers([self.nodes[0].agent.reserve_port.remote(address, listen=listen)], self.nodes[:1])[0]
        return port

    def free_port(self, node_rank: int) -> int:
        """A TCP port that is free on the node at this moment."""
        port: int = self._ask_some([self.nodes[node_rank]], "free_port", [()])[0]
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
            ray.shutdown()
        if self._folder is not None:
            self._folder.remove()
            restore_variables(self._variables)

    def _wait_for_group(self, wait_seconds: float) -> None:
        deadline, logged = time.monotonic() + wait_seconds, False
        while not self._group.wait(timeout_seconds=1 if not logged else 5):
            missing = self._missing()
            if not logged:
                self._log(f"waiting up to {wait_seconds:.0f} s for nodes: {missing}")
                logged = True
            if time.monotonic() > deadline:
                message = f"after {wait_seconds:.0f} s there are not enough free nodes: {missing}"
                raise RunFailed(message, code=FailureCode.NOT_ENOUGH_NODES)

    def _missing(self) -> str:
        """Describes what was requested and what the cluster has."""
        import ray

        found = _resources_of_nodes()
        if found is None:
            return (
                f"{describe_request(self._resources)}; Ray {ray.__version__} does not report what is free on each node"
            )
        return describe_shortage(self._resources, found)

    def _agent(self, index: int) -> Any:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        strategy = PlacementGroupSchedulingStrategy(placement_group=self._group, placement_group_bundle_index=index)
        remote = ray.remote(_agent_class())
        return remote.options(
            num_cpus=self._resources.cpus,
            num_gpus=self._resources.gpus,
            scheduling_strategy=strategy,
            max_concurrency=4,
        ).remote()


def _resources_of_nodes() -> list[tuple[dict[str, float], dict[str, float]]] | None:
    """The (total, free) resources of every live node; None if this Ray does not report what is free on each."""
    import ray

    try:
        # Ray's public API reports free resources only in total, not per node.
        from ray._private.state import available_resources_per_node
    except ImportError:
        return None
    free, drained = available_resources_per_node(), draining_nodes()
    alive = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in drained]
    return [(node["Resources"], free.get(node["NodeID"], {})) for node in alive]


def _node_lost(node_rank: int, message: str) -> NodeLostReport:
    return NodeLostReport(report="node-lost", node_rank=node_rank, time=time.time(), message=message)


def _init_ray(options: dict[str, Any]) -> None:
    """Raises errors of many classes."""
    # Imported here because Ray reads its settings once, at import.
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": False}
    handler = signal.getsignal(signal.SIGTERM)
    # Slurm may send these to every process of the task; only the launcher handles them.
    try:
        with signals_blocked(signal.SIGUSR1, signal.SIGUSR2):
            ray.init(**quiet, **options)
    finally:
        # Ray installs a handler that exits at once; the run must save first.
        signal.signal(signal.SIGTERM, handler)


def _clock_offset(node: Node) -> float:
    """Seconds by which the node's clock is ahead, from the fastest of a few round trips."""
    answers = []
    for _ in range(_CLOCK_ROUNDS):
        asked = time.time()
        theirs: float = _answers([node.agent.clock.remote()], [node])[0]
        answered = time.time()
        answers.append((answered - asked, theirs - (asked + answered) / 2))
    return round(min(answers)[1], 3)


def _answers(references: list[Any], nodes: list[Node] | None = None, seconds: float = _ANSWER_SECONDS) -> list[Any]:
    """The agents' answers, in order. Raises RunFailed for an agent that fails or does not answer; names its node."""
    import ray

    found = []
    for index, reference in enumerate(references):
        try:
            found.append(ray.get(reference, timeout=seconds))
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            message = f"{_named(index, nodes)}: {type(cause).__name__}: {first_line(cause)}"
            raise RunFailed(message, code=code_of(cause)) from None
        except ray.exceptions.RayError as error:
            hint = "the same launcher version must be installed on every node, in the Python that Ray uses there"
            message = f"{_named(index, nodes)} does not answer: {first_line(error)}\n  {hint}"
            late = isinstance(error, ray.exceptions.GetTimeoutError)
            raise RunFailed(message, code=FailureCode.TIMEOUT if late else None) from None
    return found


def _named(index: int, nodes: list[Node] | None) -> str:
    return f"node {index} ({nodes[index].host})" if nodes else f"agent {index}"


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


def address_of(setting: str) -> str:
    """The Ray address of a job's `cluster.address`."""
    return os.environ.get("RAY_ADDRESS", "local") if setting == "auto" else setting


def _sort_key(placed: tuple[dict[str, Any], Node]) -> tuple[int, bool, list[int], str]:
    """Sorts nodes by the number in their label, if they have one, then by address.

    IPv4 addresses come first, by number; others follow, by text.
    """
    facts, node = placed
    parts = node.address.split(".")
    numeric = all(part.isdigit() for part in parts)
    number = int(facts.get("Labels", {}).get(NODE_LABEL, 0))
    return (number, not numeric, [int(part) for part in parts] if numeric else [], node.address)
