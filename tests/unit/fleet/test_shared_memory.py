"""What killed ranks leave in /dev/shm, with real segments and real processes that map them."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launcher.fleet.agent import Agent, NodeTask
from launcher.fleet.shared_memory import FOLDER, remove_segments
from tests.time_limit import TIME_LIMIT_SECONDS

ADDRESS = "127.0.0.1"
CREATE = """
import mmap, os, sys, time
file = os.open(sys.argv[1], os.O_CREAT | os.O_RDWR, 0o600)
os.truncate(file, 4096)
mapped = mmap.mmap(file, 4096)
os.close(file)
print("mapped", flush=True)
time.sleep(600)
"""


class Segments:
    """Segments with names that no other test uses, and processes that map them."""

    def __init__(self) -> None:
        self.unique, self.port = secrets.token_hex(6), str(100_000 + secrets.randbelow(10**9))
        self.made: list[Path] = []
        self.processes: list[subprocess.Popen[bytes]] = []

    def deepspeed(self, rank: int, port: str | None = None) -> Path:
        """The segment of a rank, as DeepSpeed names it."""
        return self._path(f"deepspeed_allreduce_buffer_{os.getuid()}_{ADDRESS}_{port or self.port}_{rank}")

    def nccl(self) -> Path:
        return self._path(f"nccl-{self.unique}{len(self.made)}")

    def torch(self, pid: int) -> Path:
        return self._path(f"torch_{pid}_{self.unique}_{len(self.made)}")

    def _path(self, name: str) -> Path:
        self.made.append(FOLDER / name)
        return self.made[-1]

    def mapped(self, path: Path) -> subprocess.Popen[bytes]:
        """A process that has created the segment and maps it."""
        process = subprocess.Popen([sys.executable, "-c", CREATE, str(path)], stdout=subprocess.PIPE)
        self.processes.append(process)
        assert process.stdout is not None and process.stdout.readline() == b"mapped\n"
        return process

    def left(self, path: Path) -> Path:
        """A segment whose process was killed."""
        process = self.mapped(path)
        process.kill()
        process.wait()
        return path

    def remove(self, started: float, ranks: range = range(2)) -> list[str]:
        """The own names among those that are removed; other tests may leave segments too."""
        removed = remove_segments(started, ranks, {"MASTER_ADDR": ADDRESS, "MASTER_PORT": self.port})
        return [name for name in removed if self.unique in name or self.port in name]


@pytest.fixture
def segments() -> Iterator[Segments]:
    found = Segments()
    yield found
    for process in found.processes:
        process.kill()
        process.wait()
    for path in found.made:
        path.unlink(missing_ok=True)


def test_segments_of_killed_ranks_are_removed(segments: Segments) -> None:
    started = time.time()
    left = [segments.left(segments.deepspeed(rank)) for rank in range(2)]
    left += [segments.left(segments.nccl()), segments.left(segments.torch(segments.processes[0].pid))]
    assert segments.remove(started) == sorted(path.name for path in left)
    assert not any(path.exists() for path in left)


@pytest.mark.parametrize("kind", ["deepspeed", "nccl"])
def test_a_mapped_segment_is_kept(segments: Segments, kind: str) -> None:
    started = time.time()
    path = segments.deepspeed(0) if kind == "deepspeed" else segments.nccl()
    segments.mapped(path)
    assert segments.remove(started) == [] and path.exists()


def test_an_open_segment_is_kept(segments: Segments) -> None:
    """Its process has created it and is about to map it."""
    started = time.time()
    with segments.nccl().open("wb"):
        assert segments.remove(started) == []


def test_a_segment_that_a_child_maps_a_moment_longer_is_removed(segments: Segments) -> None:
    started, path = time.time(), segments.deepspeed(0)
    process = segments.mapped(path)
    threading.Timer(0.3, process.kill).start()
    assert segments.remove(started) == [path.name]


def test_segments_of_other_runs_and_users_are_kept(segments: Segments, monkeypatch: pytest.MonkeyPatch) -> None:
    started = time.time()
    other_port, other_rank = segments.left(segments.deepspeed(0, segments.port + "7")), segments.deepspeed(2)
    kept = [other_port, segments.left(other_rank), segments.left(segments.torch(os.getpid()))]
    assert segments.remove(started) == []
    own = segments.left(segments.deepspeed(0))
    assert segments.remove(time.time() + 60) == [], "older than the ranks"
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert segments.remove(started) == [], "of another user"
    assert all(path.exists() for path in [*kept, own])


KILLED = f"""
import os, signal, sys
path = "/dev/shm/deepspeed_allreduce_buffer_%d_%s_%s_%s" % (
    os.getuid(), os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], os.environ["RANK"]
)
sys.argv = ["", path]
{CREATE}
"""


def test_an_agent_removes_the_segments_of_its_killed_ranks(segments: Segments, tmp_path: Path) -> None:
    agent, folder = Agent(), tmp_path / "node-0-h0"
    paths = [segments.deepspeed(rank) for rank in (4, 5)]
    other = segments.left(segments.deepspeed(0))
    agent.start(
        NodeTask(
            node_rank=2,
            first_rank=4,
            processes=2,
            world_size=6,
            run_dir=str(tmp_path),
            log_folder=str(folder),
            environment={"MASTER_ADDR": ADDRESS, "MASTER_PORT": segments.port},
            arguments=("-c", KILLED),
        )
    )
    wait_for(lambda: all((folder / f"rank-{rank}.log").read_text().endswith("mapped\n") for rank in (4, 5)))
    assert all(path.exists() for path in paths)
    agent.end(0.0)
    assert not any(path.exists() for path in paths) and other.exists()
    assert f"removed from /dev/shm: {paths[0].name}, {paths[1].name}" in (folder / "agent.log").read_text()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIME_LIMIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
