"""Starts real `launcher` commands, and looks at the processes that they start."""

from __future__ import annotations

import contextlib
import json
import os
import re
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

from tests.time_limit import TIME_LIMIT_SECONDS

_LOOK_SECONDS = 0.3
"""Looking at processes takes time from what is tested."""
_RANK_STARTED = re.compile(r"rank ([0-9]+) started, process ([0-9]+)$", re.MULTILINE)
_AGENT = "ray::RayAgent"
RAYS_OWN_AGENTS = ("ray::RuntimeEnvAgent", "ray::Dashboard")
"""They try for a minute to reach a head that is gone, and end by themselves then."""
RAY_PROCESS = "RAY_PROCESS"
"""Names, to a Command alone, the process that started an existing Ray."""
RAY_SETTINGS = {
    # Where other programs fill the memory, Ray would kill the agent.
    "RAY_memory_monitor_refresh_ms": "0",
    # Ray would start a process for every processor, which nobody uses.
    "RAY_prestart_worker_first_driver": "false",
    "RAY_enable_worker_prestart": "false",
}
LAUNCHER = [str(Path(sys.executable).with_name("launcher"))]


def launcher_with(worker: str, setup: str = "") -> list[str]:
    """A command to use as LAUNCHER: the launcher with the ranks of tests.local.`worker`, after the code `setup`."""
    ranks = f"import launcher.runs.supervisor as s; s.WORKER = ('-P', '-m', 'tests.local.{worker}')"
    return [sys.executable, "-c", "; ".join(filter(None, (ranks, setup, "from launcher.cli import main; main()")))]


class Command:
    """A `launcher` command that runs, with everything that it has started so far.

    Its ranks are children of the fork server if the environment names one. Its agents are children of the Ray that
    the environment names; see `existing_ray`.
    """

    def __init__(self, *arguments: str, folder: Path, **environment: str) -> None:
        self.folder, self._began = folder, time.time()
        self._ray = int(environment.pop(RAY_PROCESS, 0))
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
        """Remembers every process below the command's, its ranks, and its agents on an existing Ray."""
        found = _below(self.process.pid)
        if self._ray:
            found += [process for process in _below(self._ray) if _name(process).startswith(_AGENT)]
        for process in (*found, *self.ranks().values()):
            self.started.setdefault(process.pid, process)

    def wait_for(self, condition: Callable[[], bool], seconds: float = TIME_LIMIT_SECONDS) -> None:
        """Waits until the condition holds, looking at the processes meanwhile."""
        deadline = time.monotonic() + seconds
        while not condition():
            self.look()
            assert self.process.poll() is None, f"the command ended early:\n{self.output}"
            assert time.monotonic() < deadline, f"waited {seconds} s:\n{self.output}"
            time.sleep(_LOOK_SECONDS)
        self.look()

    def wait(self, seconds: float = TIME_LIMIT_SECONDS) -> int:
        """The exit status, looking at the processes meanwhile."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None:
            assert time.monotonic() < deadline, f"still runs after {seconds} s:\n{self.output}"
            self.look()
            time.sleep(_LOOK_SECONDS)
        return self.process.returncode

    def left_behind(self, *names: str, seconds: float = 120.0) -> list[str]:
        """Started processes that still live after some seconds, except those whose name begins with one of `names`."""
        started = [process for process in self.started.values() if not _name(process).startswith(names or ("\0",))]
        _, alive = psutil.wait_procs(started, timeout=seconds)
        return [f"{process.pid} {line}" for process in alive if (line := _living(process)) is not None]

    def ranks(self) -> dict[int, psutil.Process]:
        """The live processes of the ranks, by rank, as the agents name them in their logs."""
        found = {}
        # os.walk skips folders that are removed meanwhile, as DeepSpeed's converter does.
        folders = (Path(folder) for folder, _, files in os.walk(self.folder) if "agent.log" in files)
        for folder in folders:
            if not folder.match("logs/node-*"):
                continue
            for rank, pid in _RANK_STARTED.findall((folder / "agent.log").read_text()):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process = psutil.Process(int(pid))
                    if process.create_time() > self._began - 1 and process.status() != psutil.STATUS_ZOMBIE:
                        found[int(rank)] = process
        return found

    def agent(self) -> psutil.Process:
        """The agent of a run on one node."""
        (agent,) = (p for p in _below(self._ray or self.process.pid) if _name(p).startswith(_AGENT))
        return agent


def _below(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _living(process: psutil.Process) -> str | None:
    """The start of the command line of a process; None if it has ended."""
    try:
        return None if process.status() == psutil.STATUS_ZOMBIE else " ".join(process.cmdline()[:4])
    except psutil.NoSuchProcess:
        return None


def _name(process: psutil.Process) -> str:
    """As Ray sets it; psutil's own name() is cut at 15 characters where the command line cannot be read."""
    try:
        return " ".join(process.cmdline()[:1])
    except psutil.Error:
        return ""


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
def existing_ray(cpus: int, **environment: str) -> Iterator[dict[str, str]]:
    """A Ray on this machine that the launcher did not start; the variables with which a Command uses it."""
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    token = folder / "token"
    token.write_text("0" * 64)
    token.chmod(0o600)
    keeper = (
        "import ray, sys; print(ray.init(address='local', num_cpus=int(sys.argv[2]), include_dashboard=False, "
        "object_store_memory=100 * 1024**2, _temp_dir=sys.argv[1]).address_info['gcs_address'], flush=True); "
        "sys.stdin.read()"
    )
    variables = {**environment, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    with subprocess.Popen(
        [sys.executable, "-c", keeper, str(folder), str(cpus)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, **variables, **RAY_SETTINGS},
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        address = process.stdout.readline().strip()
        yield {**variables, "RAY_ADDRESS": address, RAY_PROCESS: str(process.pid)}
        process.stdin.close()
    shutil.rmtree(folder, ignore_errors=True)
