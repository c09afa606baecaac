"""`launcher checkpoints`: the checkpoints of a run, and whether they can be trusted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from launcher.cli.options import OUTPUT_DIR, RUN_OR_URL, exiting_cleanly
from launcher.errors import Problem, RequestError

if TYPE_CHECKING:
    from launcher.runs.checkpoints import ListedCheckpoint


def checkpoints(
    run: str = RUN_OR_URL,
    verify: bool = typer.Option(False, "--verify", help="Read all files and compare their checksums."),
    json: bool = typer.Option(False, "--json", help="Print a list of objects as JSON."),
    output_dir: Path = OUTPUT_DIR,
) -> None:
    """List the checkpoints of a run, oldest first. The exit status is 1 if one of them is damaged.

    A checkpoint is complete if all its files have their sizes, and verified if they also have their checksums and no
    other file exists. An incomplete one was not saved to its end, or is being saved. One that a resume found damaged is
    set aside under another name; it is listed, and does not change the exit status.

    With the URL of a run, such as s3://BUCKET/PATH/RUN, its checkpoints in cloud storage are listed; they cannot be
    verified there, but are when they are downloaded.

    The keys of --json are: name, path, update, samples, ranks, evaluation_loss, bytes, time, state,
    reason. The states are complete,
    verified, incomplete, damaged and set aside. Unknown values are null.
    """
    from rich.console import Console

    from launcher.job.upload_url import is_url
    from launcher.runs.checkpoints import checkpoints_json, checkpoints_view, list_checkpoints
    from launcher.runs.rest import planned_run
    from launcher.watch.find_run import find_run
    from launcher.watch.status_report import status_console

    with exiting_cleanly():
        if is_url(run):
            found = _remote(run, verify)
        else:
            directory = planned_run(find_run(run, output_dir).path)
            notes = Console(stderr=True, highlight=False, soft_wrap=True)
            found = list_checkpoints(directory, notes.print if verify else None)
        if json:
            typer.echo(checkpoints_json(found))
        else:
            status_console().print(checkpoints_view(found), soft_wrap=True)
    if any(each.state == "damaged" for each in found):
        raise typer.Exit(1)


def _remote(url: str, verify: bool) -> list[ListedCheckpoint]:
    from launcher.runs.fetch import list_remote_checkpoints

    if verify:
        hint = "launcher resume --download-only URL downloads and verifies the newest one"
        raise RequestError(Problem("--verify reads local files, not a URL", key="--verify", hint=hint))
    return list_remote_checkpoints(url)
