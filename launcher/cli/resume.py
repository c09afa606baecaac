"""`launcher resume`: resume a run from its newest checkpoint."""

from __future__ import annotations

from pathlib import Path

import typer
from rich.markup import escape

from launcher.cli.options import DETACH, OUTPUT_DIR, OVERRIDES, RUN_OR_URL
from launcher.errors import Problem, RequestError
from launcher.job.upload_url import is_url
from launcher.runs.console import RunConsole
from launcher.runs.detach import resume_in_background
from launcher.runs.resume import resume as resume_run
from launcher.watch.find_run import find_run


def resume(
    run: str = RUN_OR_URL,
    overrides: list[str] = OVERRIDES,
    output_dir: Path = OUTPUT_DIR,
    to: Path = typer.Option(None, "--to", metavar="DIR", help="URL: the folder for the run, instead of output_dir."),
    download_only: bool = typer.Option(False, "--download-only", help="URL: download the run, do not resume it."),
    detach: bool = DETACH,
) -> None:
    """Resume a stopped or failed run from its newest checkpoint, also with another number of ranks or batch size.

    After a change of batch size or number of ranks, the learning rate continues at the same number of samples. After a
    change of schedule, the new one starts at the update that the run has reached.

    A URL, such as s3://BUCKET/PATH/RUN, is that of a run with checkpoint.upload: it is downloaded with its newest
    checkpoint into a new run directory, verified, and resumed there.

    With --detach the command returns when the rest is planned: the run continues in the background when the terminal is
    closed, and its output is in RUN/console.log.
    """
    if not is_url(run) and (to or download_only):
        raise RequestError(Problem("--to and --download-only are for the URL of a run", hint="leave them out"))
    directory = _download(run, to) if is_url(run) else find_run(run, output_dir).path
    if download_only:
        return
    if detach:
        typer.echo(resume_in_background(directory, overrides or ()).describe())
        return
    result = resume_run(directory, *(overrides or ()))
    raise typer.Exit(result.exit_status)


def _download(url: str, to: Path | None) -> Path:
    from launcher.runs.fetch import fetch_run

    console = RunConsole()
    directory = fetch_run(url, to, lambda text: console.note(f"          {escape(text)}")).path
    console.note(f"          downloaded to {escape(str(directory))}")
    return directory
