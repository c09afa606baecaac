"""`launcher upload`: copy a run to cloud storage."""

from __future__ import annotations

from pathlib import Path

import typer
from rich.console import Console

from launcher.cli.options import OUTPUT_DIR, RUN
from launcher.errors import Problem, RequestError
from launcher.job.upload_url import InvalidUrl, checked_url
from launcher.runs.rest import planned_run
from launcher.runs.run_lock import only_launcher_of
from launcher.watch.find_run import find_run


def upload(
    run: str = RUN,
    to: str = typer.Option(None, "--to", metavar="URL", help="Where to; default: the job's key upload."),
    output_dir: Path = OUTPUT_DIR,
) -> None:
    """Copy a run that has ended to cloud storage: what is missing of its checkpoints and its export.

    A run does this by itself if its job sets upload in the section checkpoint; this uploads what it could not.
    """
    from launcher.runs.upload import newest_plan, upload_run

    try:
        url = checked_url(to) if to else None
    except InvalidUrl as error:
        raise RequestError(Problem(f"the URL {error.reason}", key="--to", hint=error.hint)) from None
    directory = planned_run(find_run(run, output_dir).path)
    console = Console(highlight=False, soft_wrap=True)
    with only_launcher_of(directory):
        upload_run(directory, newest_plan(directory), url, console.print)
