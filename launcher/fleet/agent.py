"""The agent of one node: starts the node's ranks, receives their reports, and ends them. Independent of Ray."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import sys
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from launcher.files import OutputMode, use_output_mode
from launcher.fleet import inspect_health, inspect_node
from launcher.fleet.copy_data import tokenise_on_node
from launcher.fleet.environment import PORT_VARIABLE, inherited_environment
from launcher.fleet.forks import ForkServer
from launcher.fleet.health import NodeHealth
from launcher.fleet.heartbeat import Heartbeat, visible_gpus
from launcher.fleet.network import PortProbeResult, ProbePort, bind_free_port, free_ports, interface_of, reach
from launcher.fleet.process import RankProcess, start_process, stop_all
from launcher.fleet.ptrace import AGENT_VARIABLE
from launcher.fleet.rank_starter import RankStarter
from launcher.fleet.shared_memory import remove_segments
from launcher.fleet.stacks import RankStack, write_stacks
from launcher.plan.schema import Plan
from launcher.records import AgentReport, Order
from launcher.run_dir import ATTEMPT_VARIABLE, rank_log_name, utc_now


@dataclass(frozen=True)
class NodeTask:
    """What an agent starts in one attempt of a run: the node's rank, and its ranks.

    `arguments` are those of the node's Python.
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
    attempt: int = 1
    output_mode: OutputMode = "private"
    forked: bool = False
    """Whether the ranks are forks, where that is possible; `arguments` must run a module then."""

    def rank_environment(self, local_rank: int) -> dict[str, str]:
        """torchrun's variables for one rank; the order to start brings the master's address."""
        return {
            "RANK": str(self.first_rank + local_rank),
            "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.processes),
            "NODE_RANK": str(self.node_rank),
            "GROUP_RANK": str(self.node_rank),
            "LAUNCHER_RUN_DIR": self.run_dir,
            AGENT_VARIABLE: str(os.getpid()),
            ATTEMPT_VARIABLE: str(self.attempt),
        }


class Agent:
    """Runs on a node for one run, and starts the ranks of each attempt. Several threads may call its methods."""

    def __init__(self) -> None:
        self._processes: list[RankProcess] = []
        self._started = 0.0
        self._rendezvous: dict[str, str] = {}
        self._reports: list[AgentReport] = []
        self._new_reports = threading.Condition()
        self._log: Path | None = None
        self._closing = False
        self._attempt = 0
        self._probe_port: ProbePort | None = None
        self._heartbeat: Heartbeat | None = None
        self._starter = RankStarter(self._write_log)
        self._rendezvous_port: socket.socket | None = None

    def describe(self) -> dict[str, Any]:
        """The node's host name and the GPUs assigned to the agent."""
        return {"host": socket.gethostname(), "gpus": visible_gpus()}

    def missing_paths(self, paths: list[str]) -> list[str]:
        """Those of the paths that do not exist on this node."""
        return [path for path in paths if not Path(path).exists()]

    def tokenise_data(self, plan: str, working_directory: str) -> str | None:
        """Tokenises the data of a plan (as JSON) on this node. Returns None or an error message."""
        return tokenise_on_node(Plan.from_json(plan), working_directory)

    def clock(self) -> float:
        """The node's time, in seconds since the epoch."""
        return time.time()

    def interface_of(self, address: str) -> str | None:
        """The name of the interface with this address, or None."""
        return interface_of(address)

    def open_probe_port(self) -> int:
        """Opens a port to which other nodes connect to test the network. Returns the port."""
        self.close_probe_port()
        self._probe_port = ProbePort()
        return self._probe_port.port

    def close_probe_port(self) -> None:
        if self._probe_port is not None:
            self._probe_port.close()
            self._probe_port = None

    def reach(self, address: str, port: int, timeout_seconds: float) -> PortProbeResult | str:
        """Connects to the probe port of another node. Returns the result, or an error message."""
        try:
            return reach(address, port, timeout_seconds)
        except OSError as error:
            return f"{type(error).__name__}: {error.strerror or error}"

    def node_facts(self, run_dir: str, mark: str) -> inspect_node.NodeFacts:
        """The node's facts. Writes a mark to the run directory."""
        return inspect_node.node_facts(run_dir, mark)

    def missing_marks(self, run_dir: str, marks: list[str]) -> list[str]:
        """Those of the marks that this node does not see in the run directory."""
        return inspect_node.missing_marks(run_dir, marks)

    def measure_health(self, run_dir: str, gpus: bool, full: bool) -> NodeHealth:
        """The state of the node's GPUs and its write speed to the run directory."""
        return inspect_health.measure_health(run_dir, gpus, full)

    def run_probe(self, environment: dict[str, str], timeout_seconds: float) -> inspect_health.Probed:
        """Tries the node's devices, and the network together with the other nodes."""
        return inspect_health.run_probe({**inherited_environment(), **environment}, timeout_seconds)

    def free_port(self) -> int:
        """A free TCP port, outside the kernel's range for outgoing connections.

        It is bound seconds later, when the first rank has loaded its libraries; until then the kernel could give a port
        of that range to any connection.
        """
        return next(free_ports(secrets.token_hex(8)))

    def reserve_port(self, address: str, *, listen: bool) -> int:
        """Binds a free TCP port of an address ("" for all) until ranks are started, and returns it.

        With `listen` no other program can take it, and the first rank gets the socket. Without, only programs that
        reuse addresses can, as the rendezvous of a script does.
        """
        self._release_port()
        self._rendezvous_port = bind_free_port(address, listen=listen)
        port: int = self._rendezvous_port.getsockname()[1]
        return port

    def prepare_forks(self, task: NodeTask, offered: ForkServer | None) -> None:
        """Begins the imports of the ranks that `start` forks, unless this is done already; returns meanwhile.

        `offered` is a fork server that may be on this node.
        """
        use_output_mode(task.output_mode)
        folder = Path(task.log_folder)
        # The check of the node reports with a hint that it cannot use the run directory.
        if Path(task.run_dir).is_dir():
            with contextlib.suppress(OSError):
                self._use_log(folder)
                self._starter.prepare({**inherited_environment(), **task.environment}, folder, offered)

    def start(self, task: NodeTask) -> list[int]:
        """Starts the node's ranks, which load libraries and wait for the order "go". Returns their process ids.

        The ranks of an earlier attempt have been ended; later reports of them are dropped.
        """
        use_output_mode(task.output_mode)
        with self._new_reports:
            self._attempt, self._closing, self._processes, self._reports = task.attempt, False, [], []
            self._new_reports.notify_all()
        folder = Path(task.log_folder)
        self._use_log(folder)
        self._heartbeat = Heartbeat(
            folder,
            {
                "node_rank": task.node_rank,
                "host": socket.gethostname(),
                "address": task.address,
                "interface": task.interface,
                "attempt": task.attempt,
            },
        )
        inherited, start = inherited_environment(), self._starter.start if task.forked else start_process
        self._started, self._rendezvous = time.time(), task.environment
        for local_rank in range(task.processes):
            rank = task.first_rank + local_rank
            environment = {**inherited, **task.environment, **task.rank_environment(local_rank)}
            log = folder / rank_log_name(rank, task.attempt)
            on_report = partial(self._receive_of, task.attempt)
            command = (sys.executable, *task.arguments)
            self._processes.append(
                RankProcess(rank, command, environment, log, on_report, fds=self._fds_of(rank), start=start)
            )
            self._write_log(f"rank {rank} started, process {self._processes[-1].pid}")
        # Once rank 0 has ended, peers that wait for it must be refused.
        self._release_port()
        self._heartbeat.begin(self._processes)
        return [process.pid for process in self._processes]

    def order(self, order: Order) -> None:
        """Sends an order to every rank."""
        self._rendezvous = order["go"]["env"] if "go" in order else self._rendezvous
        for process in self._processes:
            process.order(order)

    def next_reports(self, timeout_seconds: float, attempt: int = 1) -> list[AgentReport]:
        """The reports of the ranks of an attempt since the last call; waits for the first one.

        Returns none if this is no longer the present attempt.
        """
        with self._new_reports:
            self._new_reports.wait_for(
                lambda: self._closing or attempt != self._attempt or bool(self._reports), timeout_seconds
            )
            if attempt != self._attempt:
                return []
            reports, self._reports = self._reports, []
            return reports

    def stacks(self) -> list[RankStack]:
        """Writes the stacks of the running ranks to stacks.txt beside their logs, and returns them."""
        if self._log is None:
            return []
        pids = {process.rank: process.pid for process in self._processes if process.alive()}
        return write_stacks(pids, self._log.parent, self._attempt)

    def end(self, grace_seconds: float) -> None:
        """Ends every rank that is still running."""
        running = [process for process in self._processes if process.alive()]
        if running:
            self._write_log(f"ending ranks {', '.join(str(process.rank) for process in running)}")
        stop_all(running, grace_seconds)
        self._remove_shared_memory()
        if self._heartbeat is not None:
            self._heartbeat.end()
        self.close_probe_port()
        with self._new_reports:
            self._closing = True
            self._new_reports.notify_all()

    def _remove_shared_memory(self) -> None:
        """Removes what killed ranks left in /dev/shm. Ranks that cannot be ended keep theirs."""
        if not self._processes or any(process.alive() for process in self._processes):
            return
        ranks = range(self._processes[0].rank, self._processes[-1].rank + 1)
        try:
            removed = remove_segments(self._started, ranks, self._rendezvous)
        except OSError as error:
            self._write_log(f"could not remove shared memory: {error}")
        else:
            if removed:
                self._write_log(f"removed from /dev/shm: {', '.join(removed)}")

    def _receive_of(self, attempt: int, report: AgentReport) -> None:
        if attempt == self._attempt:
            self._receive(report)

    def _receive(self, report: AgentReport) -> None:
        if self._heartbeat is not None:
            self._heartbeat.receive(report)
        # Updates are only for the heartbeat: there are many, and metrics.jsonl has them.
        if report["report"] == "update":
            return
        with self._new_reports:
            self._reports.append(report)
            self._new_reports.notify_all()
        if report["report"] == "exit":
            self._write_log(f"rank {report['rank']} ended with {report['code']}")

    def _fds_of(self, rank: int) -> dict[str, int]:
        """The reserved port for the first rank, if it is to listen there."""
        port = self._rendezvous_port
        if rank != 0 or port is None or not port.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return {}
        return {PORT_VARIABLE: port.fileno()}

    def _release_port(self) -> None:
        if self._rendezvous_port is not None:
            self._rendezvous_port.close()
            self._rendezvous_port = None

    def _use_log(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._log = folder / "agent.log"

    def _write_log(self, text: str) -> None:
        if self._log is None:
            return
        # A full disk must not prevent the agent from ending ranks or reporting their exits.
        with contextlib.suppress(OSError), self._log.open("a") as file:
            file.write(f"{utc_now()} {text}\n")
