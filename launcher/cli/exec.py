"""`launcher exec`: run a training script of one's own on a job's nodes."""

from __future__ import annotations

import re
import shlex
import zipfile
from functools import partial
from pathlib import Path

import typer
from rich.console import Console
from rich.text import Text

from launcher.cli.console import RunConsole
from launcher.cli.plan import show_plan
from launcher.cli.run import alone_in, carry_out, check_reach, interruptible, plan_and_carry_out
from launcher.errors import Problem, RequestError
from launcher.job import ScriptJob, placing, read_script_job
from launcher.plan.schema import Script
from launcher.plan.script import filled_arguments
from launcher.plan_file import read_plan
from launcher.run_dir import RunDir
from launcher.runs.planning import Checked, check_script_job, make_script_plan

_USAGE = "launcher exec job.yaml [section.key=value]... -- train.py arguments..."
CONTEXT = {"allow_interspersed_args": False}
"""So that the "--" before the script, and the script's own options, come through as they are."""
_STARTERS = re.compile(r"^(python[\d.]*|torchrun|deepspeed|accelerate|accelerate-launch|srun|mpirun|mpiexec)$")
_SHELL = (".sh", ".bash", ".zsh")


def exec_script(
    job_file: Path = typer.Argument(..., metavar="JOB.YAML", help="The job file; model and data may be missing."),
    rest: list[str] = typer.Argument(
        None, metavar="[SECTION.KEY=VALUE]... -- SCRIPT [ARGUMENT]...", help="Overrides; the script, or -m MODULE."
    ),
    dry_run: bool = typer.Option(False, "--dry-run", help="Show the plan and what a rank would run; start nothing."),
) -> None:
    """Run a script that torchrun or deepspeed would run, unmodified, on the job's nodes.

    Every rank runs it in this folder with torchrun's environment variables. LAUNCHER_DS_CONFIG, and {ds_config} in the
    arguments, name the completed DeepSpeed JSON. {trainer_args} becomes all the options that a transformers Trainer
    compares with it; {learning_rate}, {max_steps} and so on one number each; {run_dir} the run directory; {rank} and
    {local_rank} the rank's own. Options of this command stand before the job file.
    """
    overrides, arguments = split(rest or [])
    if not arguments:
        raise RequestError(Problem("no script is named", hint=_USAGE))
    job = read_script_job(job_file, overrides)
    script = script_here(arguments)
    with placing(job_file, overrides):
        checked = check_script_job(job, str(job_file))
        check_script(script)
        if dry_run:
            _show(job, script, checked)
            return
        check_reach(job, checked.machine)
    directory = RunDir.create(Path(job.output_dir).expanduser(), job.name)
    with alone_in(directory):
        make = partial(make_script_plan, job, script, checked)
        plan_and_carry_out(make, job_file, overrides, directory)


def run_again(directory: RunDir) -> None:
    """Runs a run's script once more, in the directory where it finds what its earlier start saved."""
    console = RunConsole()
    with console.closing(), interruptible(console, directory) as interrupts:
        plan = read_plan(directory.plan_file)
        console.note("running the script again, in the run directory that it had before")
        # `launcher.report` takes those back that are not made again: where a script goes on, only it knows.
        directory.rewind(samples=0, update=-1)
        directory.event({"event": "restart"})
        carry_out(plan, directory.plan_file, directory, console, None, interrupts)


def split(rest: list[str]) -> tuple[list[str], list[str]]:
    """(overrides, the script and its arguments; none of them where there is no "--"). Raises RequestError."""
    if "--" not in rest:
        return rest, []
    place = rest.index("--")
    overrides, arguments = rest[:place], rest[place + 1 :]
    if not arguments or arguments == ["-m"]:
        raise RequestError(Problem("no script is named after --", hint=_USAGE))
    if options := [override for override in overrides if override.startswith("-")]:
        raise RequestError(Problem(f"{options[0]}: options stand before the job file", hint=_USAGE))
    return overrides, arguments


def script_here(arguments: list[str]) -> Script:
    """A script that is run in this folder."""
    return Script(arguments=tuple(arguments), folder=str(Path.cwd()))


def check_script(script: Script) -> None:
    """Is the script there, and Python's? Modules are Python's to find. Raises RequestError."""
    first = script.arguments[0]
    if first == "-m":
        return
    if first.startswith("-"):
        raise RequestError(Problem(f"after -- stands a Python script or -m MODULE, found {first}", hint=_USAGE))
    if _STARTERS.match(Path(first).name):
        found = f"{first} stands before the script, and every rank is started with the node's Python already"
        raise RequestError(Problem(found, hint=f"leave it out: {_USAGE}"))
    if not Path(first).is_file():
        hint = "its path from this folder, in which it is run"
        raise RequestError(Problem(f"there is no script {first} (looked from {script.folder})", hint=hint))
    if other := _not_python(Path(first)):
        hint = "name the Python script that it starts; what it sets up belongs in cluster.env or in the batch script"
        raise RequestError(Problem(f"{first} is {other}, and every rank runs a Python script", hint=hint))


def _not_python(script: Path) -> str | None:
    """What a file is that Python would not run; None of one that it may."""
    with script.open("rb") as file:
        begin = file.readline(256)
    if begin.startswith(b"#!") and b"python" not in begin:
        return f"for another interpreter ({begin[2:].decode(errors='replace').strip()})"
    if script.suffix in _SHELL:
        return "a shell script"
    return "no text" if b"\0" in begin and not zipfile.is_zipfile(script) else None


def _show(job: ScriptJob, script: Script, checked: Checked) -> None:
    """Prints what would be done."""
    messages = Console(stderr=True, highlight=False)
    plan = make_script_plan(job, script, checked, lambda told: messages.print(f"{told['message']} …", style="dim"))
    console = Console(highlight=False)
    show_plan(plan, console)
    arguments = filled_arguments(plan, {"ds_config": "RUN/ds_config.json", "run_dir": "RUN"})
    console.print(Text.assemble("\n", ("every rank runs", "bold"), f"  python {shlex.join(arguments)}"), soft_wrap=True)
