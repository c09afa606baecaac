"""`launcher logs`: what the nodes and ranks of a run said."""

from __future__ import annotations

import time
from pathlib import Path

import typer

from launcher.cli.options import OUTPUT_DIR, RUN, reading


def logs(
    run: str = RUN,
    node: str = typer.Option(None, metavar="N|HOST", help="Only this node, by rank or host."),
    rank: int = typer.Option(None, min=0, metavar="R", help="Only this rank."),
    follow: bool = typer.Option(False, "-f", "--follow", help="Go on with new lines until the run ends."),
    tail: int = typer.Option(None, min=0, metavar="N", help="Only the last N lines of all. With -f: 100."),
    grep: str = typer.Option(None, metavar="REGEX", help="Only lines in which this is found."),
    since: str = typer.Option(None, metavar="10m|TIME", help="Only lines since 90s, 10m, 2h, 1d ago, or a time."),
    output_dir: Path = OUTPUT_DIR,
) -> None:
    """Show the lines of all nodes and ranks in the order of time, each after the name of its file.

    Times are by the supervisor's clock: those of nodes whose clocks differ are moved by the difference. A line without
    a time follows the one before it. With -f the last 100 lines come first, unless --tail or --since says otherwise.
    """
    from launcher.watch.find_run import find_run
    from launcher.watch.log_files import LogSelection
    from launcher.watch.print_logs import follow_logs, matcher, print_logs, since_seconds

    wanted, start = matcher(grep), since_seconds(since, time.time())
    with reading():
        found, choice = find_run(run, output_dir), LogSelection(node, rank)
        if follow:
            follow_logs(found, choice, wanted, start, tail)
        else:
            print_logs(found, choice, wanted, start, tail)
