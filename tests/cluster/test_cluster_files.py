"""The files of cluster/ match Ray's own schema and hold no secret; one of them brings a cluster up over ssh."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import stat
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import jsonschema
import pytest
import yaml

from launcher.errors import RunFailed
from launcher.job import validate_job
from launcher.presets import shipped_folder
from launcher.ray_jobs import ADDRESS_VARIABLES, ray_request, submit_to_ray
from tests.cluster import ssh
from tests.cluster.conftest import need
from tests.cluster.hosts import CPU_ONLY, Hosts, missing, several_hosts
from tests.cluster.tiny_jobs import BIN, hosts_of_ranks, losses, runs_of, write_tiny_job

pytestmark = pytest.mark.cluster

FOLDER = shipped_folder("cluster")
EDITED = "/opt/launcher"


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / name).read_text())


@pytest.mark.parametrize("name", ["onprem.yaml", "aws.yaml"])
def test_a_cluster_file_passes_rays_own_check(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(load(name))
    validate_config(config)
    with pytest.raises(jsonschema.ValidationError, match="Additional properties are not allowed"):
        validate_config({**config, "head_command": []})
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        words = shlex.split(commands[-1].replace(";", " ; "))
        assert {"RAY_AUTH_MODE=token", "RAY_memory_monitor_refresh_ms=0"} <= set(words)
        assert words[words.index("ray") : words.index("ray") + 2] == ["ray", "start"]
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


def test_the_launcher_is_installed_only_from_what_the_user_copies() -> None:
    """The package index has no package of that name, and anybody might publish one."""
    config = load("aws.yaml")
    [installing] = [command for command in config["setup_commands"] if "pip install" in command]
    assert [word for word in installing.split() if "launcher" in word and "bin/" not in word] == [
        "~/launcher",
        "~/wheels/ray_deepspeed_launcher-*.whl",
    ]
    assert config["file_mounts"]["~/wheels"] == "./dist"


def test_the_options_of_ray_start_are_rays_own() -> None:
    from ray.scripts.scripts import start

    known = {name for parameter in start.params for name in parameter.opts}
    for name in ("onprem.yaml", "aws.yaml"):
        options = re.findall(r"(?<=\s)--[a-z-]+", "\n".join(value for _, value in leaves(load(name))))
        assert options
        assert set(options) - {"--quiet"} <= known


def test_the_given_address_wins_over_the_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's client would prefer an address in the environment."""
    called: list[str] = []

    class Answering(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            called.append(self.path)
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    given_job = {"name": "x", "model": {"name_or_path": "m"}, "data": {"train": "t"}, "output_dir": "/shared/runs"}
    with HTTPServer(("127.0.0.1", 0), Answering) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        for name in ADDRESS_VARIABLES:
            monkeypatch.setenv(name, "http://127.0.0.1:9")
        given = f"http://127.0.0.1:{server.server_port}"
        request = ray_request(validate_job(given_job), Path("/w/job.yaml"), [], given, Path("/w"))
        with pytest.raises(RunFailed, match=f"no Ray answers at {given}"):
            submit_to_ray(request, print, dry_run=False, parsable=False, follow=False)
        server.shutdown()
    assert called
    assert {os.environ[name] for name in ADDRESS_VARIABLES} == {"http://127.0.0.1:9"}


def test_the_rayjob_is_consistent() -> None:
    """KubeRay's schema is not available here, so this checks the shape and the values that must agree."""
    job = load("kuberay-rayjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec, cluster = job["spec"], job["spec"]["rayClusterSpec"]
    assert set(spec) <= {
        *("entrypoint", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "backoffLimit", "rayClusterSpec"),
    }
    assert set(cluster) == {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"}
    locked = re.search(r"^ray==(\S+)$", (FOLDER.parent / "constraints.txt").read_text(), re.MULTILINE)
    assert locked and cluster["rayVersion"] == locked[1]
    assert cluster["authOptions"] == {"mode": "token"}
    [group] = cluster["workerGroupSpecs"]
    assert set(cluster["headGroupSpec"]) == {"rayStartParams", "template"}
    assert set(group) == {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
    for part in (cluster["headGroupSpec"], group):
        assert all(isinstance(value, str) for value in part["rayStartParams"].values())
    pods = [part["template"]["spec"] for part in (cluster["headGroupSpec"], group)]
    images = {pod_container(pod)["image"] for pod in pods}
    shared = [{m["name"]: m["mountPath"] for m in pod_container(pod)["volumeMounts"]}["shared"] for pod in pods]
    assert len(images) == 1 and shared == ["/shared", "/shared"]

    words = shlex.split(spec["entrypoint"])
    assert words[:2] == ["launcher", "run"]
    overrides = dict(word.split("=") for word in words[3:])
    assert overrides["output_dir"].startswith("/shared/") and words[2].startswith("/shared/")
    assert int(overrides["cluster.nodes"]) == group["replicas"] == group["minReplicas"] == group["maxReplicas"]
    gpus = pod_container(pods[1])["resources"]["limits"]["nvidia.com/gpu"]
    assert (
        overrides["cluster.gpus_per_node"] == gpus == pod_container(pods[1])["resources"]["requests"]["nvidia.com/gpu"]
    )
    assert "nvidia.com/gpu" not in pod_container(pods[0])["resources"]["limits"]
    [rule] = pods[1]["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert rule["labelSelector"]["matchLabels"] == {"ray.io/group": group["groupName"]}


def pod_container(pod: dict[str, Any]) -> dict[str, Any]:
    """The one container of a pod, whose mounts all name a volume."""
    [container] = pod["containers"]
    assert {"name", "image", "env", "resources", "volumeMounts"} == set(container)
    assert container["env"] == [{"name": "RAY_memory_monitor_refresh_ms", "value": "0"}]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    return container


def test_the_job_that_the_rayjob_runs_takes_its_overrides(tmp_path: Path) -> None:
    from launcher.job import load_job

    _, _, _, *overrides = shlex.split(load("kuberay-rayjob.yaml")["spec"]["entrypoint"])
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump({"model": {"name_or_path": "m"}, "data": {"train": "t.jsonl"}}))
    job = load_job(path, *overrides).job
    assert (job.cluster.nodes, job.cluster.gpus_per_node, job.output_dir) == (2, 8, "/shared/runs")


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.name)
def test_no_file_holds_a_secret(path: Path) -> None:
    for key, value in leaves(yaml.safe_load(path.read_text())):
        assert not re.search(r"RAY_AUTH_TOKEN\s*[=:]", value), key
        assert not re.search(r"[0-9a-fA-F]{32,}|AKIA[A-Z0-9]{16}|-----BEGIN", value), key
    assert "EDIT" in path.read_text()


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every value as text, with its key."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from leaves(inner, f"{key}.{name}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from leaves(inner, f"{key}[{index}]")
    else:
        yield key, str(value)


def edited(hosts: Hosts, key: Path) -> Path:
    """onprem.yaml with only the values that it asks users to edit changed for the testbed."""
    head, *workers = (hosts.address(name) for name in hosts.names)
    text = (FOLDER / "onprem.yaml").read_text()
    for old, new in {
        "head_ip: 10.0.0.11": f"head_ip: {head}",
        "[10.0.0.12, 10.0.0.13]": json.dumps(workers),
        "ssh_user: ubuntu": "ssh_user: root",
        "~/.ssh/id_ed25519": str(key),
        EDITED: str(BIN.parent),
    }.items():
        assert old in text
        text = text.replace(old, new)
    path = hosts.shared / "cluster.yaml"
    path.write_text(text)
    return path


@contextlib.contextmanager
def tunnel(hosts: Hosts, key: Path) -> Iterator[str]:
    """The head's dashboard as ctl reaches it with the README's command."""
    options = ("-i", str(key), "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null")
    process = hosts.popen("ctl", ["ssh", *options, "-N", "-L", "8265:127.0.0.1:8265", "root@h1"])
    code = "import socket; socket.create_connection(('127.0.0.1', 8265), 1)"
    try:
        process.wait_for(lambda: hosts.run("ctl", ["python3", "-c", code], check=False).returncode == 0)
        yield "http://127.0.0.1:8265"
    finally:
        process.end()


def rays_on(hosts: Hosts, host: str) -> list[str]:
    names = ("raylet", "gcs_server")
    return [name for line in hosts.command_lines(host) if line and (name := Path(line[0]).name) in names]


def gone(found: Callable[[], object], seconds: float) -> bool:
    """Whether what `found` returns is gone within the time."""
    deadline = time.monotonic() + seconds
    while found() and time.monotonic() < deadline:
        time.sleep(0.2)
    return not found()


def test_hosts_are_brought_up_over_ssh_run_a_job_and_are_taken_down() -> None:
    need(missing() or ssh.missing())
    with several_hosts(2) as hosts:
        hosts.environment.update(CPU_ONLY)
        key = ssh.start_sshd(hosts)
        # `ray down` ends the head alone; the others end once they have missed it for this long, 60 s by default.
        (ssh.home_of(hosts, "h2") / ".bashrc").write_text("export RAY_gcs_rpc_server_reconnect_timeout_s=5\n")
        cluster = str(edited(hosts, key))
        ray, secret = str(BIN / "ray"), {"RAY_AUTH_MODE": "token"}
        hosts.run("ctl", ["sh", "-c", 'umask 077; "$0" get-auth-token --generate', ray])
        up = hosts.run("ctl", [ray, "up", "-y", "--no-config-cache", cluster], seconds=300, **secret)
        token = (hosts.home / ".ray" / "auth_token").read_text()
        assert token not in up.stdout + up.stderr

        job = write_tiny_job(hosts.shared, cluster={"nodes": 2, "wait_seconds": 200}, export=False)
        with tunnel(hosts, key) as address:
            submit = [str(BIN / "launcher"), "submit", "--to", "ray", "--address", address, "--follow", job.name]
            done = hosts.run("ctl", submit, seconds=400, **secret)
        assert "succeeded" in done.stdout
        [run] = runs_of(hosts.shared)
        assert hosts_of_ranks(run) == {0: "h1", 1: "h2"}
        assert len(losses(run)) == 4

        for host in hosts.names:
            carried = ssh.home_of(hosts, host) / ".ray" / "auth_token"
            assert carried.read_text() == token and stat.S_IMODE(carried.stat().st_mode) == 0o600
        assert rays_on(hosts, "h1") and rays_on(hosts, "h2") == ["raylet"]
        hosts.run("ctl", [ray, "down", "-y", cluster], seconds=200, **secret)
        assert not rays_on(hosts, "h1")
        assert gone(lambda: rays_on(hosts, "h2"), seconds=60)
