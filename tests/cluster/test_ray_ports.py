"""Who can reach the Ray of a Slurm job: every port refuses requests without the token, from another host."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.cluster.hosts import Hosts
from tests.cluster.tiny_jobs import BIN

pytestmark = pytest.mark.cluster

PYTHON = str(BIN / "python")
ON_ALL_ADDRESSES = {"gcs_server", "raylet", "ray::DashboardA"}
"""Processes with a gRPC port for which Ray has no option for the address; SECURITY.md lists them."""
NODE = """
import signal, sys
from pathlib import Path
from launcher.fleet.ray_settings import use_token
from launcher.slurm.allocation import Allocation
from launcher.slurm.ray_node import RayNode
key, own, head, node = sys.argv[1:]
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
use_token(Path(key))
ray = RayNode(Allocation("7", int(node), 0, ("h1", "h2"), cpus=2, gpus=0), own, head or None, open("/dev/stderr", "wb"))
ray.start()
print("UP", ray.address, flush=True)
signal.sigwait({signal.SIGTERM})
ray.end()
"""
HTTP = """
import json, sys, urllib.error, urllib.request
answers = []
for host, port in json.loads(sys.argv[1]):
    for path in ("/", "/metrics", "/api/version", "/api/jobs/", "/logs", "/get_or_create_runtime_env"):
        for header in ({}, {"Authorization": "Bearer " + "cd" * 32}):
            request = urllib.request.Request(f"http://{host}:{port}{path}", headers=header)
            try:
                with urllib.request.urlopen(request, timeout=5) as answer:
                    answers.append([host, port, path, answer.status])
            except urllib.error.HTTPError as error:
                answers.append([host, port, path, error.code])
            except Exception as error:  # not HTTP
                answers.append([host, port, path, None])
print(json.dumps(answers))
"""
GRPC = """
import json, sys
import grpc
answers = []
for host, port in json.loads(sys.argv[1]):
    for method in ("NodeInfoGcsService/GetAllNodeInfo", "NodeManagerService/GetNodeStats", "ObjectManagerService/Pull",
                   "ReporterService/GetTraceback", "RayletDriver/ClusterInfo", "CoreWorkerService/KillActor"):
        for token in (None, "cd" * 32):
            data = [("authorization", f"Bearer {token}")] if token else []
            call = grpc.insecure_channel(f"{host}:{port}").unary_unary(f"/ray.rpc.{method}")
            try:
                call(b"", timeout=5, metadata=data)
                answers.append([host, port, method, "OK"])
            except grpc.RpcError as error:
                answers.append([host, port, method, error.code().name])
print(json.dumps(answers))
"""
DRIVER = "import ray, sys; ray.init(sys.argv[1], logging_level='ERROR'); print('NODES', len(ray.nodes()))"


@dataclass(frozen=True)
class RayOfTwo:
    """A Ray over h1 and h2, its address, and the variables with the right token."""

    hosts: Hosts
    address: str
    token: dict[str, str]

    def listening(self) -> list[tuple[str, str, int, str]]:
        """Host, address, port and process of every port of Ray."""
        found = []
        for host in ("h1", "h2"):
            for line in self.hosts.run(host, ["ss", "-tlnpH"]).stdout.splitlines():
                place, name = line.split()[3], re.search(r'\(\("([^"]+)"', line)
                assert name
                ip, _, port = place.rpartition(":")
                found.append((host, ip.strip("[]").removeprefix("::ffff:"), int(port), name[1]))
        return found

    def targets(self) -> str:
        """Address and port of everything, as JSON, as another host reaches it."""
        ports = {(self.hosts.address(host), port) for host, ip, port, _ in self.listening() if ip != "127.0.0.1"}
        return json.dumps(sorted(ports))


@pytest.fixture(scope="module")
def ray(hosts: Hosts) -> Iterator[RayOfTwo]:
    key = hosts.shared / "ray-ports-key"
    key.write_text("ab" * 32)
    key.chmod(0o600)
    one = hosts.popen("h1", [PYTHON, "-c", NODE, str(key), hosts.address("h1"), "", "0"])
    one.wait_for(lambda: "UP " in one.output, 180)
    address = one.output.partition("UP ")[2].split()[0]
    two = hosts.popen("h2", [PYTHON, "-c", NODE, str(key), hosts.address("h2"), address, "1"])
    two.wait_for(lambda: "UP " in two.output, 180)
    made = RayOfTwo(hosts, address, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(key)})
    names = {"ray::DashboardA", "ray::RuntimeEnv"}
    both = lambda: {(host, name) for host, _, _, name in made.listening()}  # noqa: E731
    two.wait_for(lambda: {(host, name) for host in ("h1", "h2") for name in names} <= both(), 120)
    yield made
    for process in (two, one):
        process.signal()
        process.wait()


def test_ports_are_on_the_address_of_the_cluster_or_loopback(ray: RayOfTwo) -> None:
    listening = ray.listening()
    assert {name for _, _, _, name in listening} >= {"gcs_server", "raylet", "ray::DashboardA", "ray::RuntimeEnv"}
    elsewhere = {(name, ip) for host, ip, _, name in listening if ip not in ("127.0.0.1", ray.hosts.address(host))}
    assert {name for name, _ in elsewhere} <= ON_ALL_ADDRESSES, elsewhere
    metrics = [row for row in listening if row[1] == "0.0.0.0"]
    assert metrics == []


def test_http_requests_from_another_host_are_refused(ray: RayOfTwo) -> None:
    answers = json.loads(ray.hosts.run("h3", [PYTHON, "-c", HTTP, ray.targets()], seconds=300).stdout)
    statuses = {status for _, _, _, status in answers}
    assert 401 in statuses or 403 in statuses
    assert [answer for answer in answers if answer[3] not in (None, 401, 403)] == []


def test_grpc_requests_from_another_host_are_refused(ray: RayOfTwo) -> None:
    answers = json.loads(ray.hosts.run("h3", [PYTHON, "-c", GRPC, ray.targets()], seconds=600).stdout)
    reached = {code for _, _, _, code in answers}
    assert "UNAUTHENTICATED" in reached
    assert [answer for answer in answers if answer[3] == "OK"] == []


def test_clients_need_the_token(ray: RayOfTwo) -> None:
    wrong = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "cd" * 32}
    for argv in (
        [str(BIN / "ray"), "status", "--address", ray.address],
        [PYTHON, "-c", DRIVER, ray.address],
    ):
        # A driver needs a raylet on its own host.
        for environment in ({}, wrong):
            done = ray.hosts.run("h2", argv, check=False, seconds=180, **environment)
            assert done.returncode != 0 and "NODES" not in done.stdout, done.stdout
            assert "token" in (done.stdout + done.stderr).lower(), done.stderr
        done = ray.hosts.run("h2", argv, seconds=180, **ray.token)
        assert "NODES 2" in done.stdout or "Active" in done.stdout, done.stdout
