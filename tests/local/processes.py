"""Starting the real command, and looking at the processes that it starts."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import yaml

from tests.patience import PATIENCE_SECONDS

_LOOK_SECONDS = 0.3
"""Looking at every process of the machine takes the time of what is tested."""
LAUNCHER = [str(Path(sys.executable).with_name("launcher"))]


class Command:
    """A `launcher` command that runs, with everything that it has started so far."""

    def __init__(self, *arguments: str, folder: Path, **environment: str) -> None:
        self.output_file = folder / f"output-{time.monotonic_ns()}.txt"
        with self.output_file.open("wb") as output:
            self.process = subprocess.Popen(
                [*LAUNCHER, *arguments],
                cwd=folder,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **environment},
                start_new_session=True,
            )
        self.started: dict[int, psutil.Process] = {}

    @property
    def output(self) -> str:
        return self.output_file.read_text()

    def interrupt(self, number: int = signal.SIGINT) -> None:
        """Signals the whole group, as a terminal does with Ctrl-C."""
        os.killpg(self.process.pid, number)

    def look(self) -> None:
        """Remembers every process below the command's."""
        try:
            for child in psutil.Process(self.process.pid).children(recursive=True):
                self.started.setdefault(child.pid, child)
        except psutil.NoSuchProcess:
            pass

    def wait_for(self, condition: Callable[[], bool], seconds: float = PATIENCE_SECONDS) -> None:
        """Waits until the condition holds, looking at the processes meanwhile."""
        deadline = time.monotonic() + seconds
        while not condition():
            self.look()
            assert self.process.poll() is None, f"the command ended early:\n{self.output}"
            assert time.monotonic() < deadline, f"waited {seconds} s in vain:\n{self.output}"
            time.sleep(_LOOK_SECONDS)
        self.look()

    def wait(self, seconds: float = PATIENCE_SECONDS) -> int:
        """The exit status, looking at the processes meanwhile."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None:
            assert time.monotonic() < deadline, f"still runs after {seconds} s:\n{self.output}"
            self.look()
            time.sleep(_LOOK_SECONDS)
        return self.process.returncode

    def left_behind(self, seconds: float = 120.0) -> list[str]:
        """Those of the started processes that still live some seconds later."""
        _, alive = psutil.wait_procs(list(self.started.values()), timeout=seconds)
        return [f"{p.pid} {' '.join(p.cmdline()[:4])}" for p in alive if p.is_running() and p.status() != "zombie"]

    def ranks(self) -> dict[int, psutil.Process]:
        """The live rank processes, by rank."""
        self.look()
        found = {}
        for process in self.started.values():
            try:
                if "launcher.worker" in process.cmdline():
                    found[int(process.environ()["RANK"])] = process
            except psutil.Error:
                continue
        return found


def write_job(folder: Path, job: dict) -> Path:
    """The job as job.yaml in `folder`, its runs in `folder`/runs."""
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump({**job, "output_dir": str(folder / "runs")}))
    return path


def run_folder(folder: Path) -> Path | None:
    """The one run directory under `folder`/runs, None before there is one."""
    found = [path.parent for path in (folder / "runs").glob("*/state.json")]
    assert len(found) < 2
    return found[0] if found else None


def updates_made(folder: Path) -> int:
    """Lines of metrics.jsonl so far."""
    run = run_folder(folder)
    metrics = run / "metrics.jsonl" if run else None
    return metrics.read_bytes().count(b"\n") if metrics and metrics.exists() else 0


def state_of(folder: Path) -> dict:
    run = run_folder(folder)
    assert run is not None
    return json.loads((run / "state.json").read_text())


@contextmanager
def a_ray(cpus: int) -> Iterator[dict[str, str]]:
    """A Ray that somebody else started on this machine; its environment variables."""
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    token = folder / "token"
    token.write_text("0" * 64)
    token.chmod(0o600)
    keeper = (
        "import ray, sys; print(ray.init(address='local', num_cpus=int(sys.argv[2]), include_dashboard=False, "
        "_temp_dir=sys.argv[1]).address_info['gcs_address'], flush=True); sys.stdin.read()"
    )
    variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    with subprocess.Popen(
        [sys.executable, "-c", keeper, str(folder), str(cpus)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, **variables},
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        yield {**variables, "RAY_ADDRESS": process.stdout.readline().strip()}
        process.stdin.close()
    shutil.rmtree(folder, ignore_errors=True)
