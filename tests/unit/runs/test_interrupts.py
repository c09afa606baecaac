"""Signals to the process that supervises a run, with real processes and signals."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.run_dir import RunDir
from tests.time_limit import TIME_LIMIT_SECONDS

ROOT = Path(__file__).parents[3]
UPDATES = 7
SUPERVISED = """
import sys, time
from pathlib import Path
from launcher.fleet.nodes import Node, Nodes
from launcher.run_dir import RunDir
from launcher.runs import attempts, carry_out, supervisor
from launcher.runs.console import RunConsole
from launcher.runs.interrupts import Interrupted, interruptible
from launcher.runs.supervisor import Supervisor
from tests.unit.inputs import job_of, machine_facts, plan_of

folder, console = RunDir(Path(sys.argv[1])), RunConsole()

class Ranks(Nodes):
    '''One rank: it trains, and stops when ordered, once the file "release" exists.'''

    def __init__(self, *_):
        self.nodes, self.stop = [Node(None, "h0", "10.0.0.1", ())], False
        self.batches = [[{"report": "phase", "phase": "training", "update": 0, "time": 0.0, "node_rank": 0}]]

    def order(self, order):
        self.stop = True

    def reports(self, timeout_seconds):
        console.note("x" * 9999)
        time.sleep(0.01)
        if self.batches:
            return self.batches.pop()
        if not (self.stop and (folder.path / "release").exists()):
            return []
        stopped = {"report": "stopped", "rank": 0, "node_rank": 0, "time": 0.0, "update": UPDATES, "reason": None}
        return [stopped, {"report": "exit", "rank": 0, "node_rank": 0, "time": 0.0, "code": 0}]

    def end(self, grace_seconds): ...
    def close(self): ...

class Placed(Supervisor):
    def place(self): ...
    def start(self, start):
        self.enter("starting")
        while (folder.path / "slow").exists():
            time.sleep(0.01)

attempts.Nodes, supervisor.Supervisor = Ranks, Placed
plan = plan_of(job_of(cluster={"gpus_per_node": 1}), machine=machine_facts(1))
try:
    with interruptible(console, folder) as interrupts:
        result = carry_out.carry_out(plan, folder.plan_file, folder, console, None, interrupts)
    sys.exit(result.exit_status)
except Interrupted as error:
    sys.exit(error.exit_status)
""".replace("UPDATES", str(UPDATES))


class Run:
    """A supervisor of an imitated rank in a process of its own."""

    def __init__(self, folder: Path, code: str = SUPERVISED, output: Any = None, **options: Any) -> None:
        self.directory, self._log = RunDir.create(folder, "run"), folder / "output.txt"
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code, str(self.directory.path)],
                env=environment,
                stdin=output or subprocess.DEVNULL,
                stdout=output or log,
                stderr=output or subprocess.STDOUT,
                **options,
            )

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + TIME_LIMIT_SECONDS
        while not condition():
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.02)

    def wait_for_state(self, state: str) -> None:
        self.wait_for(lambda: self.state().get("state") == state)

    def send(self, number: signal.Signals, printed: str) -> None:
        """Sends a signal and waits until the run has printed this."""
        self.process.send_signal(number)
        self.wait_for(lambda: printed in self.output)

    def release(self) -> None:
        """The rank stops once it is ordered to."""
        (self.directory.path / "release").touch()

    @property
    def output(self) -> str:
        return self._log.read_text().replace("x" * 9999 + "\n", "")

    def state(self) -> dict[str, Any]:
        return dict(self.directory.state())

    def end(self) -> tuple[int, str, str | None]:
        """Exit status, state and reason."""
        code = self.process.wait(TIME_LIMIT_SECONDS)
        return code, self.state()["state"], self.state()["reason"]


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def start(*arguments: Any, **options: Any) -> Run:
        runs.append(Run(tmp_path, *arguments, **options))
        return runs[-1]

    yield start
    for run in runs:
        run.process.kill()
        run.process.wait()


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_run_after_its_update(started: Callable[..., Run], number: signal.Signals) -> None:
    run = started()
    run.wait_for_state("training")
    run.send(number, f"{number.name}: stopping after this update, then saving (")
    run.release()
    assert run.end() == (128 + number, "stopped", f"received {number.name}"), run.output
    assert run.state()["update"] == UPDATES
    assert f"stopped after update {UPDATES} of" in run.output


def test_a_repeated_warning_and_the_sigterm_at_the_time_limit_leave_time_to_save(started: Callable[..., Run]) -> None:
    run = started()
    run.wait_for_state("training")
    run.send(signal.SIGUSR1, "(SIGTERM twice stops it now)")
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        run.process.send_signal(number)
    run.send(signal.SIGTERM, "SIGTERM: stopping after this update, then saving (a second signal stops it now)")
    run.process.send_signal(signal.SIGUSR1)
    run.release()
    assert run.end() == (128 + signal.SIGUSR1, "stopped", "received SIGUSR1"), run.output
    assert "SIGUSR2" not in run.output and run.output.count("SIGUSR1: ") == 1


def test_sigterm_twice_after_a_warning_stops_at_once(started: Callable[..., Run]) -> None:
    run = started()
    run.wait_for_state("training")
    run.send(signal.SIGUSR1, "SIGUSR1: ")
    run.send(signal.SIGTERM, "SIGTERM: ")
    run.process.send_signal(signal.SIGTERM)
    assert run.end()[:2] == (128 + signal.SIGTERM, "stopped"), run.output
    assert "stopped at once" in run.output


def test_a_warning_before_training_stops_the_run_in_order(started: Callable[..., Run], tmp_path: Path) -> None:
    (tmp_path / "slow").touch()
    run = started(SUPERVISED.replace('folder.path / "slow"', 'folder.path.parent / "slow"'))
    run.wait_for_state("starting")
    run.process.send_signal(signal.SIGUSR1)
    assert run.end() == (128 + signal.SIGUSR1, "stopped", "received SIGUSR1"), run.output
    assert "Traceback" not in run.output


def test_a_run_continues_when_its_terminal_goes_away(started: Callable[..., Run]) -> None:
    ours, terminal = pty.openpty()
    run = started(
        output=terminal,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(terminal)
    # A full buffer would block the run's output.
    os.set_blocking(ours, False)
    while run.state().get("state") != "training":
        with contextlib.suppress(BlockingIOError):
            os.read(ours, 1 << 20)
        assert run.process.poll() is None
    # The kernel sends SIGHUP to the run, and its next output fails with EIO.
    os.close(ours)
    run.process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert run.process.poll() is None
    run.process.send_signal(signal.SIGUSR1)
    run.release()
    assert run.end() == (128 + signal.SIGUSR1, "stopped", "received SIGUSR1")


FIRST_NODE = """
import contextlib, os, sys, time
from pathlib import Path
from launcher.run_dir import RunDir
from launcher.runs import slurm_node
from launcher.slurm import ray_cluster
from launcher.slurm.allocation import Allocation
from tests.unit.inputs import job_of

run, allocation = RunDir(Path(sys.argv[1])), Allocation("77", 0, 0, ("h1",), cpus=1, gpus=0)

@contextlib.contextmanager
def starts_ray(*_):
    print("starting", flush=True)
    time.sleep(600)
    yield

ray_cluster.first_node = starts_ray
with slurm_node._reporting_errors(run, allocation) as errors:
    try:
        slurm_node._on_ray_cluster(job_of(), allocation, run, errors, None)
    except slurm_node.Interrupted as error:
        sys.exit(error.exit_status)
"""


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_while_ray_starts_on_the_first_node_stops_the_run(
    started: Callable[..., Run], number: signal.Signals
) -> None:
    run = started(FIRST_NODE)
    run.wait_for(lambda: "starting\n" in run.output)
    run.process.send_signal(signal.SIGHUP)
    run.process.send_signal(number)
    assert run.end() == (128 + number, "stopped", f"received {number.name}"), run.output


OTHER_NODE = """
import sys, time
from launcher.runs import slurm_node

slurm_node._ignore_stop_signals()
print("joined", flush=True)
while not (slurm_node.Path(sys.argv[1]) / "release").exists():
    time.sleep(0.01)
"""


def test_the_task_of_another_node_ignores_stop_signals_once_it_has_joined(started: Callable[..., Run]) -> None:
    run = started(OTHER_NODE)
    run.wait_for(lambda: "joined\n" in run.output)
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
        run.process.send_signal(number)
        time.sleep(0.1)
    run.release()
    assert run.process.wait(TIME_LIMIT_SECONDS) == 0, run.output
