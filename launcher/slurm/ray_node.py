"""The Ray processes on one node of an allocation: started on separate ports, ended by process id."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import IO

import psutil

from launcher.errors import FailureCode, RunFailed
from launcher.fleet.network import free_ports
from launcher.fleet.process import signals_blocked
from launcher.fleet.ray_folder import RayFolder
from launcher.fleet.ray_settings import NODE_LABEL, OBJECT_STORE_BYTES
from launcher.slurm.allocation import Allocation

_TRIES = 3
_START_SECONDS = 90.0
_END_SECONDS = 10.0
_LOG_SECONDS = 3.0
_STARTED_TEXT = "Ray runtime started"
_NO_PORT = "65536"
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_prestart_worker_first_driver": "false",
    # When memory is nearly full, as with ZeRO's offload, Ray would kill its only worker, the agent.
    "RAY_memory_monitor_refresh_ms": "0",
    # Ray's metrics are served on all addresses to everybody, without the token. Two of the servers have no switch: on a
    # port that does not exist they do not start, and Ray continues without them.
    "RAY_enable_metrics_collection": "false",
    "AUTOSCALER_METRIC_PORT": _NO_PORT,
    "DASHBOARD_METRIC_PORT": _NO_PORT,
}
_PORT_OPTIONS = (
    "--node-manager-port",
    "--object-manager-port",
    "--dashboard-agent-listen-port",
    "--dashboard-agent-grpc-port",
    "--runtime-env-agent-port",
    "--metrics-export-port",
)
_HEAD_PORT_OPTIONS = ("--ray-client-server-port", "--dashboard-port")


class RayNode:
    """The Ray processes of one node. `address` is that of the cluster."""

    def __init__(self, allocation: Allocation, node_address: str, head_address: str | None, log: IO[bytes]) -> None:
        self._allocation, self._log = allocation, log
        self._node_address, self._head_address = node_address, head_address
        self._folder = RayFolder()
        self._process: subprocess.Popen[bytes] | None = None
        self.address = head_address or ""

    def start(self) -> None:
        """Starts Ray on the node; tries again with other ports if one was taken. Raises RunFailed."""
        for attempt in range(_TRIES):
            ports = free_ports(f"{self._allocation.job_id}-{self._allocation.node}-{attempt}")
            if self._start_once(ports):
                return
            self._stop()
        message = f"Ray did not start on {socket.gethostname()} in {_TRIES} tries"
        raise RunFailed(message, code=FailureCode.RAY_LOST)

    def ended(self) -> bool:
        """Whether Ray's processes ended by themselves: the head counts a node as dead that it could not reach."""
        return self._process is None or self._process.poll() is not None

    def start_again(self) -> None:
        """Starts Ray on the node after its end; the head may not be reachable yet. Raises nothing."""
        self._stop()
        shutil.rmtree(self._folder.ray, ignore_errors=True)
        self._write(f"Ray ended on {socket.gethostname()}; starting it again")
        ports = free_ports(f"{self._allocation.job_id}-{self._allocation.node}-{time.monotonic_ns()}")
        if not self._start_once(ports):
            self._stop()
            self._write("Ray did not start; trying again")

    def _write(self, text: str) -> None:
        self._log.write(f"{text}\n".encode())
        self._log.flush()

    def end(self) -> None:
        """Ends every process that `start` started, and removes their files."""
        self._stop()
        self._folder.remove()

    def _start_once(self, ports: Iterator[int]) -> bool:
        command, head_port = self._command(ports)
        # Slurm sends these to every process of a job's tasks at once. Ray's processes and the ranks must not end before
        # the run has saved: only the launcher handles the signals, and ends the others itself.
        with signals_blocked(signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={**os.environ, **_ENVIRONMENT},
                start_new_session=True,
            )
        up = threading.Event()
        self._copier = threading.Thread(target=self._copy, args=(self._process.stdout, up), daemon=True)
        self._copier.start()
        deadline = time.monotonic() + _START_SECONDS
        while not up.wait(0.1):
            if self._process.poll() is not None or time.monotonic() > deadline:
                return False
        if self._head_address is None:
            self.address = f"{self._node_address}:{head_port}"
        return True

    def _command(self, ports: Iterator[int]) -> tuple[list[str], int]:
        """The command `ray start` for this node, and the port of the head."""
        options = {name: str(next(ports)) for name in _PORT_OPTIONS}
        port = next(ports)
        if self._head_address is None:
            options |= {name: str(next(ports)) for name in _HEAD_PORT_OPTIONS} | {"--port": str(port)}
            options |= {"--include-dashboard": "false", "--dashboard-host": "127.0.0.1"}
        else:
            options["--address"] = self._head_address
        options |= {
            "--node-ip-address": self._node_address,
            "--num-cpus": str(self._allocation.cpus),
            "--num-gpus": str(self._allocation.gpus),
            "--labels": f"{NODE_LABEL}={self._allocation.node}",
            "--object-store-memory": str(OBJECT_STORE_BYTES),
            "--temp-dir": str(self._folder.ray),
            # 0: any free port. Ray's default range is the same for every Ray on a node.
            "--min-worker-port": "0",
            "--max-worker-port": "0",
        }
        head = ["--head"] if self._head_address is None else []
        given = [f"{name}={value}" for name, value in options.items()]
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
        return [*ray, "--log-color=false", *head, *given], port

    def _copy(self, source: IO[bytes] | None, up: threading.Event) -> None:
        assert source is not None
        with source:
            for line in source:
                self._log.write(line)
                self._log.flush()
                if _STARTED_TEXT.encode() in line:
                    up.set()

    def _stop(self) -> None:
        """Kills the started processes by id: they block SIGTERM and have nothing to save."""
        if self._process is None:
            return
        started = _started_by(self._process.pid)
        self._process.kill()
        for process in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()
        psutil.wait_procs(started, timeout=_END_SECONDS)
        # The caller closes the log after this, so wait until it is complete.
        self._copier.join(_LOG_SECONDS)
        self._process = None


def _started_by(leader: int) -> list[psutil.Process]:
    """The other processes of a session and all that they started, also those whose parents have ended."""
    found: set[psutil.Process] = set()
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getsid(process.pid) == leader:
                found |= {process, *process.children(recursive=True)}
    return [process for process in found if process.pid != leader]
