"""Starting a Ray of our own: again once if it does not start in time. Ray is imitated, its processes are real."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from launcher.errors import FailureCode, RunFailed
from launcher.fleet import ray_connection as fleet
from launcher.fleet.node_resources import NodeResources
from launcher.fleet.nodes import Nodes
from launcher.fleet.ray_folder import RayFolder

LATE = "The current node timed out during startup. [raylet]\nsome more"


class ImitatedRay(ModuleType):
    """A Ray whose starts end with the given errors; None is a start in time."""

    def __init__(self, *errors: Exception | None) -> None:
        super().__init__("ray")
        self.errors, self.options = list(errors), list[dict[str, Any]]()
        self.processes: list[subprocess.Popen[bytes]] = []
        self.left: list[str] = []
        self.shutdowns = 0

    def init(self, **options: Any) -> None:
        self.options.append(options)
        if "_temp_dir" in options:
            folder = Path(options["_temp_dir"])
            self.left += [path.name for path in folder.glob("*")]
            folder.mkdir()
            (folder / "session").touch()
        self.processes.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]))
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if (error := self.errors.pop(0)) is not None:
            raise error

    def shutdown(self) -> None:
        self.shutdowns += 1

    def alive(self) -> list[bool]:
        return [process.poll() is None for process in self.processes]


@pytest.fixture
def notes() -> list[str]:
    return []


@pytest.fixture
def nodes(notes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(fleet, "RayFolder", lambda: RayFolder(tmp_path))
    monkeypatch.setattr(fleet, "job_config", lambda: None)
    handler = signal.getsignal(signal.SIGTERM)
    yield Nodes(NodeResources(nodes=1, cpus=2, gpus=0), notes.append)
    signal.signal(signal.SIGTERM, handler)


def imitated(monkeypatch: pytest.MonkeyPatch, *errors: Exception | None) -> ImitatedRay:
    ray = ImitatedRay(*errors)
    monkeypatch.setitem(sys.modules, "ray", ray)
    return ray


def end(ray: ImitatedRay) -> None:
    for process in ray.processes:
        process.kill()
        process.wait()


def test_a_ray_that_does_not_start_in_time_is_started_again(
    nodes: Nodes, notes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ray, handler = imitated(monkeypatch, Exception(LATE), None), signal.getsignal(signal.SIGTERM)
    try:
        nodes.connect("local")
        (note,) = notes
        assert "Ray did not start (The current node timed out during startup. \\[raylet])" in note
        assert note.endswith("; starting it again")
        # The processes and files of the first try are gone, and its options are the same.
        assert ray.alive() == [False, True] and ray.left == [] and ray.shutdowns == 1
        assert ray.options[0] == ray.options[1]
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        end(ray)


@pytest.mark.parametrize(
    ("address", "errors", "starts", "message"),
    [
        ("local", [Exception(LATE), TimeoutError("late again")], 2, "could not start Ray on this machine: late again"),
        ("local", [TypeError("no such option")], 1, "could not start Ray on this machine: no such option"),
        ("10.0.0.1:6379", [ConnectionError("no Ray")], 1, "could not connect to the Ray at 10.0.0.1:6379: no Ray"),
    ],
)
def test_other_failures_end_the_run(
    nodes: Nodes,
    monkeypatch: pytest.MonkeyPatch,
    address: str,
    errors: list[Exception],
    starts: int,
    message: str,
) -> None:
    ray = imitated(monkeypatch, *errors)
    with pytest.raises(RunFailed) as raised:
        nodes.connect(address)
    assert str(raised.value) == message and raised.value.code is FailureCode.RAY_LOST
    assert ray.alive() == [False] * starts
