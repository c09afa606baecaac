"""`launcher exec`: run your own training script on the nodes of a job."""

from __future__ import annotations

import shlex
from pathlib import Path

import typer
from rich.console import Console
from rich.text import Text

from launcher.cli.options import JOB_FILE, WITH_SCRIPT, split_command
from launcher.errors import Problem, RequestError
from launcher.job import LoadedJob, ScriptJob, load_job
from launcher.plan.schema import Script
from launcher.plan.script import fill_arguments
from launcher.runs.planning import check_job, make_plan
from launcher.runs.print_plan import print_plan
from launcher.runs.run import run
from launcher.runs.script import USAGE, check_script

CONTEXT = WITH_SCRIPT


def exec_script(
    job_file: Path = JOB_FILE,
    rest: list[str] = typer.Argument(
        None, metavar="[SECTION.KEY=VALUE]... -- SCRIPT [ARGUMENT]...", help="Overrides; the script, or -m MODULE."
    ),
    dry_run: bool = typer.Option(False, "--dry-run", help="Print the plan and a rank's command; start nothing."),
) -> None:
    """Run a training script written for torchrun or deepspeed, unmodified, on the job's nodes.

    Every rank runs it in this folder with torchrun's environment variables. LAUNCHER_DS_CONFIG is the path of the
    completed DeepSpeed JSON.

    Placeholders in the arguments are filled in: {ds_config} with that path, {trainer_args} with all options that a
    transformers Trainer compares with the JSON, {learning_rate}, {max_steps} and the like with one number each,
    {run_dir} with the run directory, and {rank} and {local_rank} with those of each rank.

    Options of this command go before the job file. Without a script after --, the job's script.command is run.
    """
    overrides, command = split_command(rest or [])
    if command is None and any("=" not in word for word in overrides):
        raise RequestError(Problem("-- and a script are missing", hint=USAGE))
    loaded = load_job(job_file, *overrides, command=command or ())
    if dry_run:
        _print_dry_run(loaded)
        return
    raise typer.Exit(run(loaded).exit_status)


def _print_dry_run(loaded: LoadedJob) -> None:
    messages, console = Console(stderr=True, highlight=False), Console(highlight=False)
    checked = check_job(loaded)
    with loaded.locate_errors():
        assert isinstance(loaded.job, ScriptJob)
        check_script(loaded.job)
    plan = make_plan(checked, on_progress=lambda progress: messages.print(f"{progress['message']} …", style="dim"))
    print_plan(plan, console)
    assert isinstance(plan.workload, Script)
    arguments = fill_arguments(plan, plan.workload, {"ds_config": "RUN/ds_config.json", "run_dir": "RUN"})
    console.print(Text.assemble("\n", ("every rank runs", "bold"), f"  python {shlex.join(arguments)}"), soft_wrap=True)
