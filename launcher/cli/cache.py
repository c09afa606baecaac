"""`launcher cache`: list the entries of a cache folder, or remove old ones."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

import typer

from launcher.cli.options import OUTPUT_DIR, exiting_cleanly
from launcher.errors import Problem, RequestError


class Action(StrEnum):
    """What `launcher cache` does."""

    LIST = "list"
    CLEAN = "clean"


def cache(
    action: Action = typer.Argument(..., help="list: print the entries. clean: remove some of them."),
    place: str = typer.Argument(
        None,
        metavar="[CACHE]",
        help="A cache folder, or a job file, whose cache it is. Default: .cache in --output-dir.",
    ),
    older_than: str = typer.Option(
        None, "--older-than", metavar="TIME", help="Remove entries that were not used for this time: 90m, 12h, 30d, 2w."
    ),
    everything: bool = typer.Option(False, "--all", help="Remove all entries."),
    json: bool = typer.Option(False, "--json", help="Print the entries as a list of objects."),
    output_dir: Path = OUTPUT_DIR,
) -> None:
    """List or remove tokenised data and converted models in a cache folder.

    A table shows what each entry was made of, its size, and when it was last used. An entry that a live run uses, on
    any machine that sees the folder, is never removed; a run that needs a removed entry later makes it again.

    data.cache_limit_gb in a job file limits the size of its cache: after tokenising, the entries that were not used for
    the longest time are removed.

    The keys of --json are: path, kind, about, bytes, unused_seconds, in_use. The kinds are data, model, unfinished.
    """
    from launcher.runs.clean_cache import cache_of, clean_cache, list_cache, seconds_of
    from launcher.watch.status_report import status_console

    cleans = action is Action.CLEAN
    if cleans and (older_than is None) == (not everything):
        hint = "for example: launcher cache clean --older-than 30d"
        raise RequestError(Problem("clean needs either --older-than TIME or --all", hint=hint))
    if not cleans and (older_than is not None or everything):
        raise RequestError(Problem("--older-than and --all are options of clean, not of list"))
    if cleans and json:
        raise RequestError(Problem("--json is an option of list, not of clean"))
    with exiting_cleanly():
        folder = cache_of(place, output_dir)
        if cleans:
            for line in clean_cache(folder, seconds_of(older_than) if older_than else 0.0):
                typer.echo(line)
        elif json:
            typer.echo(list_cache(folder, as_json=True))
        else:
            status_console().print(list_cache(folder, as_json=False), soft_wrap=True)
