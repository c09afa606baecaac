"""A Ray cluster over the hosts of a testbed, started with `ray start` and a token as by hand."""

from __future__ import annotations

import secrets
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.cluster.hosts import HostProcess, Hosts
from tests.local.launcher_commands import RAY_SETTINGS

BIN = Path(sys.executable).parent
_SHARED_MEMORY = 100 * 1024**2
_NODE_ID = """
import ray, sys
ray.init(log_to_driver=False)
print(*[node["NodeID"] for node in ray.nodes() if node["NodeManagerAddress"] == sys.argv[1]])
"""


class RayCluster:
    """Ray on every host; the first is the head, and the other hosts reach its dashboard. It ends with the hosts."""

    def __init__(self, hosts: Hosts, cpus: int) -> None:
        self.hosts, self.cpus = hosts, cpus
        self.head = hosts.names[0]
        self.address = f"http://{hosts.address(self.head)}:8265"
        self.own_environment: dict[str, dict[str, str]] = {}
        """Environment variables of Ray, and so of agents and ranks, on some hosts."""
        token = hosts.shared / "ray-token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        self.secret = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}

    def start(self) -> RayCluster:
        """Returns once every host has joined."""
        dashboard = f"--dashboard-host={self.hosts.address(self.head)}"
        self._start(self.head, "--head", "--port=6379", "--include-dashboard=true", dashboard)
        with ThreadPoolExecutor() as pool:
            list(pool.map(self.join, self.hosts.names[1:]))
        return self

    def join(self, host: str) -> None:
        """Starts Ray on a host that was powered on again."""
        self._start(host, f"--address={self.head}:6379")

    def drain(self, host: str, seconds: float) -> None:
        """Makes Ray drain a host, as before a preemption, and end its processes after some seconds."""
        address = f"--address={self.head}:6379"
        listed = self.run(
            self.head, "python", "-c", _NODE_ID, self.hosts.address(host), RAY_ADDRESS=f"{self.head}:6379"
        )
        words = ("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "test")
        node, deadline = f"--node-id={listed.stdout.split()[-1]}", f"--deadline-remaining-seconds={seconds:.0f}"
        self.run(self.head, "ray", "drain-node", address, node, *words, deadline)

    def run(self, host: str, *argv: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Runs a program of this Python's environment on a host, with the token."""
        return self.hosts.run(host, [str(BIN / argv[0]), *argv[1:]], **{**self.secret, **options})

    def popen(self, host: str, *argv: str, **options: Any) -> HostProcess:
        return self.hosts.popen(host, [str(BIN / argv[0]), *argv[1:]], **{**self.secret, **options})

    def _start(self, host: str, *options: str) -> None:
        limits = (f"--num-cpus={self.cpus}", "--num-gpus=0", f"--object-store-memory={_SHARED_MEMORY}")
        own = f"--node-ip-address={self.hosts.address(host)}"
        # As over ssh without a login shell: the environment's programs are not on the PATH.
        settings = {**RAY_SETTINGS, "PATH": "/usr/bin:/bin", **self.own_environment.get(host, {})}
        self.run(host, "ray", "start", own, *limits, *options, "--disable-usage-stats", **settings)
