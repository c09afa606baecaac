"""The agent of one node: starts the node's ranks, hears them, and ends them. Knows nothing of Ray."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import RunFailed
from launcher.fleet.process import RankProcess, stop_all
from launcher.run_dir import utc_now

Event = dict[str, Any]
# Ray gives its workers ports from 10002 to 19999.
_LOWEST_PORT, _PORT_TRIES = 20000, 100


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


def _lowest_outgoing_port() -> int:
    """Where the kernel's range for outgoing connections begins; Linux's default where it cannot be read."""
    try:
        return max(_LOWEST_PORT + 1000, int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0]))
    except OSError:
        return 32768


class Agent:
    """Lives on a node for one run. Its methods may be called from several threads."""

    def __init__(self) -> None:
        self._processes: list[RankProcess] = []
        self._events: list[Event] = []
        self._news = threading.Condition()
        self._log: Path | None = None
        self._closing = False

    def describe(self) -> dict[str, Any]:
        """The node's host name, and the GPUs that the agent holds."""
        devices = [d for d in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if d]
        return {"host": socket.gethostname(), "gpus": devices}

    def missing(self, paths: list[str]) -> list[str]:
        """Those of the paths that this node does not see."""
        return [path for path in paths if not Path(path).exists()]

    def free_port(self) -> int:
        """A TCP port that nothing listens on, outside the range from which the kernel serves outgoing connections.

        It is bound seconds later, when the first rank has loaded its libraries; until then a port of that range could
        go to any connection of any process.
        """
        for _ in range(_PORT_TRIES):
            port = random.randrange(_LOWEST_PORT, _lowest_outgoing_port())
            with socket.socket() as probe, contextlib.suppress(OSError):
                probe.bind(("", port))
                return port
        raise RunFailed(f"no free TCP port was found on {socket.gethostname()} in {_PORT_TRIES} tries")

    def start(self, task: NodeTask) -> list[int]:
        """Starts the node's ranks, which load their libraries and wait for `go`. Returns their process ids."""
        folder = Path(task.log_folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._log = folder / "agent.log"
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        for local_rank in range(task.processes):
            rank = task.first_rank + local_rank
            environment = {**inherited, **task.environment, **task.rank_environment(local_rank)}
            log = folder / f"rank-{rank}.log"
            self._processes.append(RankProcess(rank, (sys.executable, *task.arguments), environment, log, self._hear))
            self._note(f"rank {rank} started, process {self._processes[-1].pid}")
        return [process.pid for process in self._processes]

    def order(self, order: dict[str, Any]) -> None:
        """Passes an order on to every rank."""
        for process in self._processes:
            process.order(**order)

    def next_events(self, timeout_seconds: float, patient: bool = False) -> list[Event]:
        """What the ranks reported since the last call, waiting for the first of it.

        Where the caller is patient, updates wait for other news or for the end of the time: there are many of them, and
        each answer would take processor time from the ranks.
        """

        def news() -> bool:
            return self._closing or any(not patient or event["report"] != "update" for event in self._events)

        with self._news:
            self._news.wait_for(news, timeout_seconds)
            events, self._events = self._events, []
            return events

    def end(self, grace_seconds: float) -> None:
        """Ends every rank that still runs."""
        running = [process for process in self._processes if process.alive()]
        if running:
            self._note(f"ending ranks {', '.join(str(process.rank) for process in running)}")
        stop_all(running, grace_seconds)
        with self._news:
            self._closing = True
            self._news.notify_all()

    def _hear(self, event: Event) -> None:
        if event["report"] == "exit":
            self._note(f"rank {event['rank']} ended with {event['code']}")
        with self._news:
            self._events.append(event)
            self._news.notify_all()

    def _note(self, text: str) -> None:
        if self._log is not None:
            with self._log.open("a") as file:
                file.write(f"{utc_now()} {text}\n")
