"""Runs in the background: planned in the foreground, then carried out by a process in a session of its own."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import RunFailed
from launcher.files import last_lines, output_mode
from launcher.job import LoadedJob
from launcher.job.user_path import user_path
from launcher.plan_file import read_plan
from launcher.prepare.machine import measure_machine
from launcher.run_dir import RunDir
from launcher.runs.carry_out import carry_out
from launcher.runs.console import RunConsole
from launcher.runs.imports import ImportsAhead
from launcher.runs.interrupts import check_main_thread, interruptible
from launcher.runs.outcome import RunResult
from launcher.runs.reach import check_reach
from launcher.runs.remote import check_upload
from launcher.runs.rest import planned_run, rest_of
from launcher.runs.run import check_to_run, plan_in
from launcher.runs.run_lock import only_launcher_of

_POLL_SECONDS = 0.1
_SHOWN_LINES = 20


@dataclass(frozen=True)
class BackgroundRun:
    """A run that the process `pid` carries out in the background."""

    directory: RunDir
    pid: int

    def describe(self) -> str:
        """The run directory, and the commands to follow and stop the run."""
        run = shlex.quote(str(self.directory.path))
        return "\n".join(
            [
                f"running in the background, process {self.pid}",
                f"  run directory    {self.directory.path}",
                f"  output           {self.directory.console_file}",
                f"  follow it        launcher logs --follow {run}",
                f"                   launcher status {run}",
                f"  stop it          launcher cancel {run}",
            ]
        )


def run_in_background(job: LoadedJob) -> BackgroundRun:
    """Plans a job, and starts a process that runs it. Raises RequestError if the job is invalid, and RunFailed."""
    check_main_thread()
    checked, console, mode = check_to_run(job), RunConsole(), job.job.output_mode
    with output_mode(mode):
        directory = RunDir.create(user_path(job.job.output_dir, "output_dir"), job.job.name, mode=mode)
        with only_launcher_of(directory), job.locate_errors(), interruptible(console, directory):
            plan_in(directory, checked, console)
        return _start(directory, ["run", "--planned", str(directory.path)])


def resume_in_background(path: Path, overrides: Sequence[str]) -> BackgroundRun:
    """Plans the rest of a run, and starts a process that resumes it. Raises RequestError if it cannot be resumed.

    That process verifies the content of the checkpoint, which may take long. Raises RunFailed if it ends at once.
    """
    check_main_thread()
    directory, console = planned_run(path), RunConsole()
    with output_mode(read_plan(directory.plan_file).job.output_mode):
        with only_launcher_of(directory), interruptible(console, directory):
            rest = rest_of(directory, overrides, console, verify=False)
            check_upload(rest.plan.job)
            check_reach(rest.plan.job, measure_machine())
        return _start(directory, ["resume", str(directory.path), *overrides])


def run_planned(path: Path) -> RunResult:
    """Runs the plan that `run_in_background` has written. Raises RunFailed, and Interrupted for a stop at once."""
    directory, console = planned_run(path), RunConsole()
    plan = read_plan(directory.plan_file)
    with (
        output_mode(plan.job.output_mode),
        only_launcher_of(directory),
        console.closing(),
        interruptible(console, directory) as interrupts,
        ImportsAhead(plan.job, plan.world, directory.logs / "imports.log") as imports,
    ):
        imports.begin()
        return carry_out(plan, directory.plan_file, directory, console, None, interrupts, imports.server)


def _start(directory: RunDir, arguments: Sequence[str]) -> BackgroundRun:
    """Starts the launcher in the background. Returns when it holds the lock of the run, so that the run is not lost."""
    with directory.console_file.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "launcher", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    while process.poll() is None:
        holder = directory.holder()
        if holder is not None and holder.pid == process.pid:
            break
        time.sleep(_POLL_SECONDS)
    if process.returncode:
        lines = "\n".join(f"    {line}" for line in last_lines(directory.console_file, _SHOWN_LINES))
        message = f"the run ended at once, with exit status {process.returncode}\n  {directory.console_file}:\n{lines}"
        raise RunFailed(message)
    return BackgroundRun(directory, process.pid)
