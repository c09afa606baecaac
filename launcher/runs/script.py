"""A user's training script: checking it, and running it again in its run directory."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

from launcher.errors import Problem, RequestError
from launcher.job import ScriptJob
from launcher.job.user_path import user_path
from launcher.plan_file import read_plan
from launcher.run_dir import RunDir
from launcher.runs.carry_out import carry_out
from launcher.runs.console import RunConsole
from launcher.runs.interrupts import interruptible
from launcher.runs.outcome import RunResult

USAGE = "launcher exec job.yaml [section.key=value]... -- train.py arguments..."
_STARTERS = re.compile(r"^(python[\d.]*|torchrun|deepspeed|accelerate|accelerate-launch|srun|mpirun|mpiexec)$")
_SHELL = (".sh", ".bash", ".zsh")


def check_script(job: ScriptJob) -> None:
    """Raises RequestError if the script does not exist or is not a Python script, or if Slurm is to resubmit it.

    Modules are not looked up here.
    """
    if job.slurm.resubmit:
        found = "this does not work with a script, which manages its own checkpoints"
        hint = "leave it out, and submit the next job from the script"
        raise RequestError(Problem(found, key="slurm.resubmit", hint=hint))
    command, folder = job.script.command, user_path(job.script.folder, "script.folder").absolute()
    if not command or command == ["-m"]:
        raise RequestError(Problem("a script is missing", key="script.command", hint=USAGE))
    if not folder.is_dir():
        raise RequestError(Problem(f"the folder {folder} does not exist", key="script.folder"))
    first = command[0]
    if first == "-m":
        return
    if first.startswith("-"):
        found = f"the command must start with a Python script or -m MODULE, found {first}"
        raise RequestError(Problem(found, key="script.command", hint=USAGE))
    if _STARTERS.match(Path(first).name):
        found = f"{first} before the script is not needed: every rank is started with the node's Python"
        raise RequestError(Problem(found, key="script.command", hint=f"leave it out: {USAGE}"))
    script = folder / first
    if not script.is_file():
        hint = "give its path relative to script.folder, in which it is run"
        found = f"the script {first} does not exist in {folder}"
        raise RequestError(Problem(found, key="script.command", hint=hint))
    if other := _not_python(script):
        hint = "give the Python script that it starts; put its settings in cluster.env or in the batch script"
        found = f"{first} is {other}, but every rank runs a Python script"
        raise RequestError(Problem(found, key="script.command", hint=hint))


def run_script_again(directory: RunDir) -> RunResult:
    """Runs the script of a run again in its run directory, in which it finds its own checkpoints."""
    console = RunConsole()
    with console.closing(), interruptible(console, directory) as interrupts:
        plan = read_plan(directory.plan_file)
        console.note("running the script again in its run directory")
        # Only the script knows at which update it resumes: `launcher.report` restores the lines before that update.
        directory.rewind(samples=0, update=-1)
        directory.event({"event": "restart"})
        return carry_out(plan, directory.plan_file, directory, console, None, interrupts)


def _not_python(script: Path) -> str | None:
    """The kind of file if Python cannot run it, else None."""
    with script.open("rb") as file:
        first_line = file.readline(256)
    if first_line.startswith(b"#!") and b"python" not in first_line:
        return f"for another interpreter ({first_line[2:].decode(errors='replace').strip()})"
    if script.suffix in _SHELL:
        return "a shell script"
    return "a binary file" if b"\0" in first_line and not zipfile.is_zipfile(script) else None
