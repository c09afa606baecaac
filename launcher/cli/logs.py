"""`launcher logs`: the log lines of a run's nodes and ranks."""

from __future__ import annotations

import time
from pathlib import Path

import typer

from launcher.cli.options import OUTPUT_DIR, RUN, exiting_cleanly


def logs(
    run: str = RUN,
    node: str = typer.Option(None, metavar="N|HOST", help="Only this node, by rank or host."),
    rank: int = typer.Option(None, min=0, metavar="R", help="Only this rank."),
    follow: bool = typer.Option(False, "-f", "--follow", help="Print new lines until the run ends."),
    tail: int = typer.Option(None, min=0, metavar="N", help="Only the last N lines in all. Default with -f: 100."),
    grep: str = typer.Option(None, metavar="REGEX", help="Only lines that match."),
    since: str = typer.Option(
        None, metavar="10m|TIME", help="Only lines of the last 90s, 10m, 2h or 1d, or since a time."
    ),
    output_dir: Path = OUTPUT_DIR,
) -> None:
    """Show the log lines of all nodes and ranks in order of time, each prefixed with its file's name.

    Times are those of the supervisor's clock; the times of nodes whose clocks differ are corrected. A line without a
    time follows the line before it. With -f, the last 100 lines come first; --tail and --since change that.
    """
    from launcher.watch.find_run import find_run
    from launcher.watch.log_files import LogSelection
    from launcher.watch.print_logs import follow_logs, matcher, print_logs, since_seconds

    matches, start = matcher(grep), since_seconds(since, time.time())
    with exiting_cleanly():
        found, selection = find_run(run, output_dir), LogSelection(node, rank)
        if follow:
            follow_logs(found, selection, matches, start, tail)
        else:
            print_logs(found, selection, matches, start, tail)
