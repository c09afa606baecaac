"""`launcher logs`: what the nodes and ranks of a run said."""

from __future__ import annotations

import re
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from launcher.cli.watching import OUTPUT_DIR, RUN, reading
from launcher.errors import Problem, RequestError

if TYPE_CHECKING:
    from launcher.run_dir import RunDir
    from launcher.watch.log_files import LogFile, LogSelection
    from launcher.watch.log_lines import Wanted

FOLLOWED_FROM = 100
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_SINCE = re.compile(r"^(\d+(?:\.\d+)?)([smhd])$")


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

    wanted, start = _pattern(grep), _since(since, time.time())
    with reading():
        found, choice = find_run(run, output_dir), LogSelection(node, rank)
        if follow:
            _follow(found, choice, wanted, start, tail)
        else:
            _past(found, choice, wanted, start, tail)


def _past(run: RunDir, choice: LogSelection, wanted: Wanted, since: float | None, tail: int | None) -> None:
    from launcher.watch.log_files import check_selection, log_files_of
    from launcher.watch.log_lines import merged
    from launcher.watch.print_lines import Printer
    from launcher.watch.run_session import read_session

    check_selection(run, choice)
    sources = log_files_of(run, read_session(run).offsets, choice)
    printer = Printer(sys.stdout)
    printer.print(merged(sources, since=since, last=tail, wanted=wanted), sources)


def _follow(run: RunDir, choice: LogSelection, wanted: Wanted, since: float | None, tail: int | None) -> None:
    from launcher.watch.end_of_run import EndOfRun
    from launcher.watch.follow_logs import Follower
    from launcher.watch.log_files import check_live_selection, log_files_of
    from launcher.watch.log_lines import merged
    from launcher.watch.print_lines import Printer
    from launcher.watch.run_session import read_session
    from launcher.watch.status import LOST

    def find() -> list[LogFile]:
        session = read_session(run)
        found = log_files_of(run, session.offsets, choice)
        if not found:
            check_live_selection(run, session, choice)
        return found

    follower = Follower(find)
    end, printer = EndOfRun(run), Printer(sys.stdout)
    if tail is None and since is None:
        tail = FOLLOWED_FROM
    past = merged(follower.log_files, since=since, last=tail, wanted=wanted, ends=follower.ends)
    printer.print(past, follower.log_files)
    for lines in follower.batches(lambda: end.reached(follower.quiet_seconds)):
        printer.print(filter(wanted, lines), follower.log_files)
    if end.state == LOST:
        typer.echo(f"the run is lost; launcher why {run.path} says more", err=True)


def _pattern(grep: str | None) -> Wanted:
    if grep is None:
        return lambda _: True
    try:
        pattern = re.compile(grep)
    except re.error as error:
        raise RequestError(Problem(f"{grep!r} is no regular expression: {error}", key="--grep")) from None
    return lambda line: pattern.search(line.text) is not None


def _since(text: str | None, now: float) -> float | None:
    """Seconds since the epoch of what --since says. Raises RequestError where that is no time."""
    if text is None:
        return None
    if match := _SINCE.match(text):
        return now - float(match[1]) * _UNITS[match[2]]
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        hint = "90s, 10m, 2h or 1d ago, or a time as 2026-03-01T12:30:00Z (UTC where it names no zone)"
        raise RequestError(Problem(f"{text!r} is no time", key="--since", hint=hint)) from None
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()
