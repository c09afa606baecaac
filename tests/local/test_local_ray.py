"""The Ray that the launcher starts for one machine: who can reach it, and that its folder is removed after kill -9."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from launcher.fleet.ray_folder import remove_abandoned

pytestmark = pytest.mark.local

EXPECTED = {"gcs_server", "raylet", "ray::DashboardAgent", "ray::RuntimeEnvAgent", "ray::RayAgent"}
WITH_A_RAY = """
import sys
import tempfile
from launcher.fleet.node_resources import NodeResources
from launcher.fleet.nodes import Nodes
nodes = Nodes(NodeResources(nodes=1, cpus=1, gpus=0), print)
nodes.connect("local")
[node] = nodes.place(60.0)
print(nodes._ray.folder.path, node.address, flush=True)
sys.stdin.read()
"""


def start() -> tuple[subprocess.Popen[str], Path, str]:
    """A process with a Ray, once its agent is placed; the Ray's folder and the node's address."""
    process = subprocess.Popen(
        [sys.executable, "-c", WITH_A_RAY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    folder, address = process.stdout.readline().split()
    return process, Path(folder), address


def listening_of(process: subprocess.Popen[str]) -> list[tuple[str, str]]:
    """Each process's name and address at which one of the Ray takes connections, once those that must do so are up."""
    deadline = time.monotonic() + 60
    while True:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        listening = [place for member in family for place in listens_at(member)]
        if {name for name, _ in listening} >= EXPECTED or time.monotonic() > deadline:
            return listening
        time.sleep(0.2)


def listens_at(process: psutil.Process) -> list[tuple[str, str]]:
    """The process's name, with each address at which it takes connections."""
    with contextlib.suppress(psutil.NoSuchProcess):
        name, found = process.name(), process.net_connections("inet")
        return [(name, connection.laddr.ip) for connection in found if connection.status == psutil.CONN_LISTEN]
    return []


def test_only_this_user_on_this_machine_reaches_the_ray_and_nothing_of_it_is_left() -> None:
    process, folder, address = start()
    try:
        assert address == "127.0.0.1"
        listening = listening_of(process)
        assert {name for name, _ in listening} >= EXPECTED
        assert {ip.removeprefix("::ffff:") for _, ip in listening} == {"127.0.0.1"}, listening

        # Ray makes what is its own open to everybody; nobody else gets there.
        assert stat.S_IMODE((folder / "r").stat().st_mode) == 0o777
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert stat.S_IMODE((folder / "token").stat().st_mode) == 0o600
        remove_abandoned()
        assert (folder / "token").is_file()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert folder.is_dir()
    remove_abandoned()
    assert not folder.exists()


TWICE = """
import os
import ray  # which reads RAY_AUTH_MODE
from launcher.fleet.node_resources import NodeResources
from launcher.fleet.nodes import Nodes

before = dict(os.environ)
for _ in range(2):
    nodes = Nodes(NodeResources(nodes=1, cpus=1, gpus=0), lambda note: None)
    nodes.connect("local")
    [node] = nodes.place(60.0)
    nodes.close()
    print(nodes._ray.folder.path.exists(), flush=True)
changed = {name for name in {**before, **os.environ} if before.get(name) != os.environ.get(name)}
print(sorted(name for name in changed if "AUTH" in name or "CLUSTER" in name))
"""


def test_a_process_may_start_one_ray_after_another_and_then_has_its_own_variables_again() -> None:
    done = subprocess.run([sys.executable, "-c", TWICE], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["False", "False", "[]"], done.stderr


IN_USE = """
import os, sys, ray
from launcher import RequestError, load_job, run

os.chdir(sys.argv[1])
ray.init(num_cpus=1, include_dashboard=False, _temp_dir=sys.argv[2])
try:
    run(load_job("job.yaml"))
except RequestError as error:
    print(error)
print(ray.is_initialized(), os.path.exists("runs"))
"""


def test_a_run_leaves_the_ray_that_its_process_already_uses_alone(job_dict, tmp_path) -> None:
    (tmp_path / "job.yaml").write_text(json.dumps(job_dict))
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    token = Path(folder) / "token"
    token.write_text("0" * 64)
    token.chmod(0o600)
    done = subprocess.run(
        [sys.executable, "-c", IN_USE, str(tmp_path), folder],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)},
    )
    shutil.rmtree(folder, ignore_errors=True)
    *message, last = done.stdout.splitlines()
    assert message[0].startswith("Ray is already initialised in this process"), done.stdout + done.stderr
    assert last == "True False"
