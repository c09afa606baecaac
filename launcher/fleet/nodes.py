"""Nodes through Ray: one agent a node, in a placement group that takes no more than was asked for."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launcher.errors import FailureCode, RunFailed, code_of, first_line
from launcher.files import keep_private
from launcher.fleet.agent import Event, NodeTask
from launcher.fleet.network import LOOPBACK
from launcher.fleet.ray_folder import RayFolder
from launcher.fleet.ray_settings import LOOPBACK_ONLY, job_config, quiet_ray, use_token, write_token
from launcher.plan.schema import Plan, World

Tell = Callable[[str], None]
_POLL_SECONDS = 2.0
_ANSWER_SECONDS = 120.0
OBJECT_STORE_BYTES = 100 * 1024**2
_REACH_SECONDS = 10.0
_PROVIDE_SECONDS = 12 * 3600.0
_CLOCK_ROUNDS = 3
NODE_LABEL = "launcher-node"
"""The label that holds a node's number in a Ray started by `launcher node`."""


@dataclass(frozen=True)
class Needs:
    """What a run takes of each node."""

    nodes: int
    cpus: int
    gpus: int

    @classmethod
    def of(cls, world: World) -> Needs:
        """A processor a rank, and its GPU."""
        processes = world.processes_per_node
        return cls(world.nodes, cpus=processes, gpus=processes if world.device == "cuda" else 0)

    def bundle(self) -> dict[str, float]:
        return {"CPU": self.cpus, "GPU": self.gpus} if self.gpus else {"CPU": self.cpus}


@dataclass(frozen=True)
class Node:
    """An agent on its node. Node rank 0 is the first of the list that `Nodes.place` returns."""

    agent: Any
    host: str
    address: str
    gpus: tuple[str, ...]
    interface: str | None = None
    clock_offset_seconds: float = 0.0


class Nodes:
    """A Ray that was started or joined, and the nodes that a run has on it."""

    def __init__(self, needs: Needs, tell: Tell) -> None:
        self._needs, self._tell = needs, tell
        self._group: Any = None
        self._folder: RayFolder | None = None
        self.nodes: list[Node] = []
        self._pending: dict[Any, int] = {}

    def connect(self, address: str) -> None:
        """Joins the Ray at `address`, or starts one of our own for "local". Raises RunFailed."""
        quiet_ray()
        own = address == "local"
        if own:
            # Ray starts a process in advance for every processor it is given, and the agent is the only one here.
            self._needs = replace(self._needs, cpus=1)
        options = self._own_ray() if own else {"address": address}
        # Only now: Ray reads its settings once, when it is imported.
        import ray

        config = job_config()
        handler = signal.getsignal(signal.SIGTERM)
        try:
            quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": False}
            ray.init(job_config=config, **quiet, **options)
            # Ray takes the signal for itself and exits at once, where a run would save first.
            signal.signal(signal.SIGTERM, handler)
        except Exception as error:  # Ray has no common kind for what goes wrong here
            where = "a Ray on this machine could not be started" if own else f"no Ray at {address}"
            raise RunFailed(f"{where}: {first_line(error)}", code=FailureCode.RAY_LOST) from None

    def _own_ray(self) -> dict[str, Any]:
        """Options for a Ray of our own: on this machine alone, with what the run needs and a secret of its own."""
        self._folder = RayFolder()
        write_token(self._folder.token)
        use_token(self._folder.token)
        os.environ.update(LOOPBACK_ONLY)
        return {
            "address": "local",
            "num_cpus": self._needs.cpus,
            "num_gpus": self._needs.gpus,
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
            "_temp_dir": str(self._folder.ray),
            # Where memory is nearly full, as with what ZeRO offloads, Ray would kill its only worker, the agent.
            "_system_config": {"memory_monitor_refresh_ms": 0},
        }

    def place(self, wait_seconds: float) -> list[Node]:
        """One agent a node, in a stable order. Raises RunFailed with what is missing."""
        import ray
        from ray.util.placement_group import placement_group

        self._group = placement_group([self._needs.bundle()] * self._needs.nodes, strategy="STRICT_SPREAD")
        self._wait_for_group(wait_seconds)
        agents = [self._agent(index) for index in range(self._needs.nodes)]
        found = _answers([agent.describe.remote() for agent in agents])
        ids = _answers([agent.ray_node_id.remote() for agent in agents])
        known = {node["NodeID"]: node for node in ray.nodes()}
        placed = [
            (known[node_id], Node(agent, facts["host"], known[node_id]["NodeManagerAddress"], tuple(facts["gpus"])))
            for agent, facts, node_id in zip(agents, found, ids, strict=True)
        ]
        self.nodes = [node for _, node in sorted(placed, key=_order)]
        if len(self.nodes) > 1:
            self._find_interfaces()
            self._compare_clocks()
        elif self._folder is not None and self.nodes[0].address != LOOPBACK:
            self._tell("          note: this Ray listens on all interfaces of this machine; its token protects it")
        return self.nodes

    def ask(self, method: str, arguments: Sequence[tuple[Any, ...]], seconds: float = _ANSWER_SECONDS) -> list[Any]:
        """What every node's agent answers to `method`, called with its own arguments; in the order of nodes."""
        return self._ask_some(self.nodes, method, arguments, seconds)

    def provide(self, plan: Plan, paths: list[str]) -> None:
        """Has each node that does not see all of the paths tokenise the plan's data for itself. Raises RunFailed."""
        poor = [node for node, missing in zip(self.nodes, self.missing(paths), strict=True) if missing]
        if not poor:
            return
        self._tell(f"          tokenising on {', '.join(node.host for node in poor)} too: data is not shared")
        order = (plan.to_json(), str(Path.cwd()))
        answers = self._ask_some(poor, "provide", [order] * len(poor), _PROVIDE_SECONDS)
        wrong = [f"{node.host}: {answer}" for node, answer in zip(poor, answers, strict=True) if answer]
        if wrong:
            raise RunFailed(f"the data could not be tokenised on every node: {'; '.join(wrong)}")

    @staticmethod
    def _ask_some(
        nodes: list[Node], method: str, arguments: Sequence[tuple[Any, ...]], seconds: float = _ANSWER_SECONDS
    ) -> list[Any]:
        calls = [getattr(node.agent, method).remote(*given) for node, given in zip(nodes, arguments, strict=True)]
        return _answers(calls, nodes, seconds)

    def _find_interfaces(self) -> None:
        """Has every node connect to the first, which shows the interface that it takes. Raises RunFailed."""
        first, others = self.nodes[0], self.nodes[1:]
        port, interface = _answers([first.agent.open_doorbell.remote(), first.agent.interface_of.remote(first.address)])
        calls = [node.agent.reach.remote(first.address, port, _REACH_SECONDS) for node in others]
        found = _answers(calls, others)
        _answers([first.agent.close_doorbell.remote()])
        cut_off = [
            f"node {rank} ({node.host}) does not reach node 0 ({first.host}) at {first.address}: {reached}"
            for rank, (node, reached) in enumerate(zip(others, found, strict=True), start=1)
            if isinstance(reached, str)
        ]
        if cut_off:
            hint = "every node must reach every other over TCP at the address by which Ray knows it"
            raise RunFailed(f"{'; '.join(cut_off)}\n  {hint}", code=FailureCode.NETWORK)
        rest = [replace(node, interface=reached.interface) for node, reached in zip(others, found, strict=True)]
        self.nodes = [replace(first, interface=interface), *rest]

    def _compare_clocks(self) -> None:
        """How far every node's clock is ahead of this one's: the quickest of a few answers, halved."""
        self.nodes = [replace(node, clock_offset_seconds=_clock_offset(node)) for node in self.nodes]

    def missing(self, paths: list[str]) -> list[list[str]]:
        """Of every node those of the paths that it does not see."""
        return self.ask("missing", [(paths,)] * len(self.nodes))

    def check_sees(self, paths: list[str]) -> None:
        """Raises RunFailed, naming the nodes, where one does not see a path that all need."""
        blind = [
            f"node {rank} ({node.host}) does not see {', '.join(missing)}"
            for rank, (node, missing) in enumerate(zip(self.nodes, self.missing(paths), strict=True))
            if missing
        ]
        if blind:
            message = f"{'; '.join(blind)}: it must lie on storage that all nodes share"
            raise RunFailed(message, code=FailureCode.NOT_SHARED)

    def start(self, tasks: list[NodeTask]) -> None:
        """Starts the ranks of every node: the task at index k is that of node rank k."""
        self.ask("start", [(task,) for task in tasks])

    def free_port(self, node_rank: int) -> int:
        """A TCP port that is free on a node at this moment."""
        port: int = self._ask_some([self.nodes[node_rank]], "free_port", [()])[0]
        return port

    def order(self, **order: Any) -> None:
        """Gives an order to every rank."""
        self.ask("order", [(order,)] * len(self.nodes))

    def events(self, timeout_seconds: float) -> list[Event]:
        """What ranks reported, each event with its `node_rank`; a node that is gone reports "node-lost"."""
        import ray

        for index, node in enumerate(self.nodes):
            if index not in self._pending.values():
                self._pending[node.agent.next_events.remote(_POLL_SECONDS)] = index
        ready, _ = ray.wait(list(self._pending), num_returns=len(self._pending), timeout=timeout_seconds)
        found: list[Event] = []
        for reference in ready:
            index = self._pending.pop(reference)
            try:
                found += [{**event, "node_rank": index} for event in ray.get(reference)]
            except ray.exceptions.RayActorError as error:
                reason = first_line(error)
                found.append({"report": "node-lost", "node_rank": index, "time": time.time(), "message": reason})
        return found

    def end(self, grace_seconds: float) -> None:
        """Ends every rank on every node that still answers."""
        if not self.nodes:
            return
        import ray

        with contextlib.suppress(ray.exceptions.RayError):
            endings = [node.agent.end.remote(grace_seconds) for node in self.nodes]
            ray.wait(endings, num_returns=len(endings), timeout=grace_seconds + 15)

    def close(self) -> None:
        """Gives the nodes back, and ends the Ray that was started here."""
        import ray

        if not ray.is_initialized():
            return
        with contextlib.suppress(Exception):
            for node in self.nodes:
                ray.kill(node.agent)
            if self._group is not None:
                ray.util.remove_placement_group(self._group)
        ray.shutdown()
        if self._folder is not None:
            self._folder.remove()

    def _wait_for_group(self, wait_seconds: float) -> None:
        deadline, told = time.monotonic() + wait_seconds, False
        while not self._group.wait(timeout_seconds=1 if not told else 5):
            missing = self._missing()
            if not told:
                self._tell(f"waiting up to {wait_seconds:.0f} s for nodes: {missing}")
                told = True
            if time.monotonic() > deadline:
                message = f"after {wait_seconds:.0f} s there are not enough free nodes: {missing}"
                raise RunFailed(message, code=FailureCode.NOT_ENOUGH_NODES)

    def _missing(self) -> str:
        """What was asked for against what the cluster has, in words."""
        import ray

        try:
            # Ray's public interface has what is free in all, not on each node.
            from ray._private.state import available_resources_per_node
        except ImportError:
            return f"{asked_in_words(self._needs)}; Ray {ray.__version__} does not report what is free on each node"
        free = available_resources_per_node()
        alive = [(node["Resources"], free.get(node["NodeID"], {})) for node in ray.nodes() if node["Alive"]]
        return missing_in_words(self._needs, alive)

    def _agent(self, index: int) -> Any:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        strategy = PlacementGroupSchedulingStrategy(placement_group=self._group, placement_group_bundle_index=index)
        remote = ray.remote(_agent_class())
        return remote.options(
            num_cpus=self._needs.cpus,
            num_gpus=self._needs.gpus,
            scheduling_strategy=strategy,
            max_concurrency=4,
        ).remote()


def missing_in_words(needs: Needs, nodes: Sequence[tuple[Mapping[str, float], Mapping[str, float]]]) -> str:
    """What is asked for against what each node (has, has free) now, with what too many of them are short of."""
    wanted = needs.bundle()
    large = [(has, free) for has, free in nodes if _holds(has, wanted)]
    ready = [free for _, free in large if _holds(free, wanted)]
    text = f"{asked_in_words(needs)}; of {len(nodes)} in this Ray {len(large)} have that much, "
    text += f"and {len(ready)} have it free now"
    for key, value in wanted.items():
        short = [free.get(key, 0) for _, free in large if free.get(key, 0) < value]
        if short:
            text += f"; {key}: too few free on {len(short)}, at most {max(short):g}"
    return text


def asked_in_words(needs: Needs) -> str:
    """What is asked for: asked for 2 nodes with 8 CPU and 8 GPU each."""
    each = " and ".join(f"{value:g} {key}" for key, value in needs.bundle().items())
    return f"asked for {needs.nodes} node{'s' if needs.nodes > 1 else ''} with {each} each"


def _holds(found: Mapping[str, float], wanted: Mapping[str, float]) -> bool:
    return all(found.get(key, 0) >= value for key, value in wanted.items())


def _clock_offset(node: Node) -> float:
    answers = []
    for _ in range(_CLOCK_ROUNDS):
        asked = time.time()
        theirs: float = _answers([node.agent.clock.remote()], [node])[0]
        answered = time.time()
        answers.append((answered - asked, theirs - (asked + answered) / 2))
    return round(min(answers)[1], 3)


def _answers(references: list[Any], nodes: list[Node] | None = None, seconds: float = _ANSWER_SECONDS) -> list[Any]:
    """What the agents answer, in order. Raises RunFailed, naming the node where it is known, for one that does not."""
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
            hint = "the same launcher must be installed on every node, in the Python that Ray runs there"
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
            # What it and its ranks write is for the run's owner alone.
            keep_private()
            super().__init__()

        def ray_node_id(self) -> str:
            return str(ray.get_runtime_context().get_node_id())

    return RayAgent


def address_of(setting: str) -> str:
    """The Ray address that a job's `cluster.address` means."""
    return os.environ.get("RAY_ADDRESS", "local") if setting == "auto" else setting


def _order(placed: tuple[dict[str, Any], Node]) -> tuple[int, bool, list[int], str]:
    """Nodes that were numbered when their Ray was started stand in that order, others in the order of addresses.

    IPv4 addresses are sorted by number, and others after them by text.
    """
    facts, node = placed
    parts = node.address.split(".")
    numeric = all(part.isdigit() for part in parts)
    number = int(facts.get("Labels", {}).get(NODE_LABEL, 0))
    return (number, not numeric, [int(part) for part in parts] if numeric else [], node.address)
