"""`launcher run`: run a job file."""

from __future__ import annotations

from pathlib import Path

import typer

from launcher.cli.options import JOB_FILE, OVERRIDES
from launcher.job import load_job
from launcher.runs.run import run as run_job


def run(job_file: Path = JOB_FILE, overrides: list[str] = OVERRIDES) -> None:
    """Plan and run a job: place the nodes, start the ranks, train, save checkpoints, export the model.

    If the job has a `script` section, that script is run instead.
    """
    result = run_job(load_job(job_file, *(overrides or ())))
    raise typer.Exit(result.exit_status)
