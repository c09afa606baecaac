"""`launcher run`: run a job file."""

from __future__ import annotations

from pathlib import Path

import typer

from launcher.cli.options import DETACH, JOB_FILE, OVERRIDES
from launcher.job import load_job
from launcher.runs.detach import run_in_background, run_planned
from launcher.runs.run import run as run_job


def run(
    job_file: Path = JOB_FILE,
    overrides: list[str] = OVERRIDES,
    detach: bool = DETACH,
    planned: bool = typer.Option(False, "--planned", hidden=True),
) -> None:
    """Plan and run a job: place the nodes, start the ranks, train, save checkpoints, export the model.

    If the job has a `script` section, that script is run instead. With --detach the command returns when the plan is
    made: the run continues in the background when the terminal is closed, and its output is in RUN/console.log.
    """
    if planned:
        # Started by `--detach`: the argument is a run directory with a plan.
        raise typer.Exit(run_planned(job_file).exit_status)
    job = load_job(job_file, *(overrides or ()))
    if detach:
        typer.echo(run_in_background(job).describe())
        return
    raise typer.Exit(run_job(job).exit_status)
