"""`launcher plan`: show the plan of a job without running it."""

from __future__ import annotations

from pathlib import Path

import typer
from rich.console import Console

from launcher.cli.options import JOB_FILE, OVERRIDES
from launcher.job import load_job
from launcher.runs.planning import make_plan
from launcher.runs.print_plan import print_plan


def plan(
    job_file: Path = JOB_FILE,
    overrides: list[str] = OVERRIDES,
    as_json: bool = typer.Option(False, "--json", help="Print plan.json."),
) -> None:
    """Show the plan of a job: ranks, batches, updates, learning rate, DeepSpeed JSON, memory. Starts no rank."""
    messages = Console(stderr=True, highlight=False)
    made_plan = make_plan(
        load_job(job_file, *(overrides or ())),
        on_progress=lambda progress: messages.print(f"{progress['message']} …", style="dim"),
    )
    if as_json:
        typer.echo(made_plan.to_json(), nl=False)
    else:
        print_plan(made_plan, Console(highlight=False))
