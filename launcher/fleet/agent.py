"""The agent of one node: starts the node's ranks, hears them, and ends them. Knows nothing of Ray."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.fleet import inspect_node
from launcher.fleet.copy_data import provide
from launcher.fleet.heartbeat import Heartbeat, given_gpus
from launcher.fleet.network import Doorbell, Reached, free_ports, interface_of, reach
from launcher.fleet.process import RankProcess, stop_all
from launcher.plan.schema import Plan
from launcher.run_dir import utc_now

Event = dict[str, Any]


@dataclass(frozen=True)
class NodeTask:
    """What an agent does for a run: its node's place among the nodes, and its ranks.

    `arguments` follow the node's own Python.
    """

    node_rank: int
    first_rank: int
    processes: int
    world_size: int
    run_dir: str
    log_folder: str
    environment: dict[str, str]
    arguments: tuple[str, ...]
    address: str | None = None
    interface: str | None = None

    def rank_environment(self, local_rank: int) -> dict[str, str]:
        """torchrun's variables for one rank; the master's address follows with the order to go."""
        return {
            "RANK": str(self.first_rank + local_rank),
            "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.processes),
            "NODE_RANK": str(self.node_rank),
            "GROUP_RANK": str(self.node_rank),
            "LAUNCHER_RUN_DIR": self.run_dir,
        }


class Agent:
    """Lives on a node for one run. Its methods may be called from several threads."""

    def __init__(self) -> None:
        self._processes: list[RankProcess] = []
        self._events: list[Event] = []
        self._news = threading.Condition()
        self._log: Path | None = None
        self._closing = False
        self._doorbell: Doorbell | None = None
        self._heartbeat: Heartbeat | None = None

    def describe(self) -> dict[str, Any]:
        """The node's host name, and the GPUs that the agent holds."""
        return {"host": socket.gethostname(), "gpus": given_gpus()}

    def missing(self, paths: list[str]) -> list[str]:
        """Those of the paths that this node does not see."""
        return [path for path in paths if not Path(path).exists()]

    def provide(self, plan: str, working_directory: str) -> str | None:
        """Tokenises the data of a plan (as JSON) on this node. None, or what went wrong."""
        return provide(Plan.from_json(plan), working_directory)

    def clock(self) -> float:
        """The node's time, in seconds since the epoch."""
        return time.time()

    def interface_of(self, address: str) -> str | None:
        """The name of the interface that has one of the node's addresses."""
        return interface_of(address)

    def open_doorbell(self) -> int:
        """Lets other nodes connect, to show that they can. Returns the port."""
        self.close_doorbell()
        self._doorbell = Doorbell()
        return self._doorbell.port

    def close_doorbell(self) -> None:
        if self._doorbell is not None:
            self._doorbell.close()
            self._doorbell = None

    def reach(self, address: str, port: int, timeout_seconds: float) -> Reached | str:
        """How this node gets to another one's doorbell, or why it does not."""
        try:
            return reach(address, port, timeout_seconds)
        except OSError as error:
            return f"{type(error).__name__}: {error.strerror or error}"

    def look(self, run_dir: str, mark: str) -> inspect_node.NodeFacts:
        """What the node has; leaves a mark in the run directory."""
        return inspect_node.look(run_dir, mark)

    def unseen(self, run_dir: str, marks: list[str]) -> list[str]:
        """The other nodes' marks that this node does not see."""
        return inspect_node.unseen(run_dir, marks)

    def rehearse(self, environment: dict[str, str], timeout_seconds: float) -> str | None:
        """Takes part in one small all-reduce of the nodes. None, or what went wrong."""
        return inspect_node.rehearse({**self._inherited(), **environment}, timeout_seconds)

    def free_port(self) -> int:
        """A TCP port that nothing listens on, outside the range from which the kernel serves outgoing connections.

        It is bound seconds later, when the first rank has loaded its libraries; until then a port of that range could
        go to any connection of any process.
        """
        return next(free_ports(secrets.token_hex(8)))

    def start(self, task: NodeTask) -> list[int]:
        """Starts the node's ranks, which load their libraries and wait for `go`. Returns their process ids."""
        folder = Path(task.log_folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._log = folder / "agent.log"
        identity = {"node_rank": task.node_rank, "host": socket.gethostname()}
        self._heartbeat = Heartbeat(folder, {**identity, "address": task.address, "interface": task.interface})
        inherited = self._inherited()
        for local_rank in range(task.processes):
            rank = task.first_rank + local_rank
            environment = {**inherited, **task.environment, **task.rank_environment(local_rank)}
            log = folder / f"rank-{rank}.log"
            self._processes.append(RankProcess(rank, (sys.executable, *task.arguments), environment, log, self._hear))
            self._note(f"rank {rank} started, process {self._processes[-1].pid}")
        self._heartbeat.begin(self._processes)
        return [process.pid for process in self._processes]

    def order(self, order: dict[str, Any]) -> None:
        """Passes an order on to every rank."""
        for process in self._processes:
            process.order(**order)

    def next_events(self, timeout_seconds: float) -> list[Event]:
        """What the ranks reported since the last call, waiting for the first of it."""
        with self._news:
            self._news.wait_for(lambda: self._closing or bool(self._events), timeout_seconds)
            events, self._events = self._events, []
            return events

    def end(self, grace_seconds: float) -> None:
        """Ends every rank that still runs."""
        running = [process for process in self._processes if process.alive()]
        if running:
            self._note(f"ending ranks {', '.join(str(process.rank) for process in running)}")
        stop_all(running, grace_seconds)
        if self._heartbeat is not None:
            self._heartbeat.end()
        self.close_doorbell()
        with self._news:
            self._closing = True
            self._news.notify_all()

    def _hear(self, event: Event) -> None:
        if self._heartbeat is not None:
            self._heartbeat.hear(event)
        # Updates are for the heartbeat: there are many of them, and metrics.jsonl has them.
        if event["report"] == "update":
            return
        with self._news:
            self._events.append(event)
            self._news.notify_all()
        if event["report"] == "exit":
            self._note(f"rank {event['rank']} ended with {event['code']}")

    @staticmethod
    def _inherited() -> dict[str, str]:
        """What ranks get of the agent's environment: nothing of Ray's, and the tools of this Python's environment.

        DeepSpeed builds its kernels with the ninja that was installed with it, which is not found otherwise where the
        launcher was called by its path.
        """
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        tools = str(Path(sys.executable).parent)
        path = inherited.get("PATH", os.defpath)
        return inherited if tools in path.split(os.pathsep) else {**inherited, "PATH": f"{tools}{os.pathsep}{path}"}

    def _note(self, text: str) -> None:
        if self._log is None:
            return
        # A full disk must not keep the agent from ending ranks, or from telling of their ends.
        with contextlib.suppress(OSError), self._log.open("a") as file:
            file.write(f"{utc_now()} {text}\n")
