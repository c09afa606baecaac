"""Printing the log lines of a run, past ones or as they come."""

from __future__ import annotations

import re
import sys
from datetime import UTC, datetime

from launcher.errors import Problem, RequestError
from launcher.run_dir import RunDir
from launcher.watch.end_of_run import EndOfRun
from launcher.watch.follow_logs import Follower
from launcher.watch.log_files import LogFile, LogSelection, check_live_selection, check_selection, log_files_of
from launcher.watch.log_lines import Wanted, merged
from launcher.watch.print_lines import Printer
from launcher.watch.run_session import read_session
from launcher.watch.status import LOST

FOLLOWED_FROM = 100
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_SINCE = re.compile(r"^(\d+(?:\.\d+)?)([smhd])$")


def print_logs(run: RunDir, choice: LogSelection, wanted: Wanted, since: float | None, tail: int | None) -> None:
    check_selection(run, choice)
    sources = log_files_of(run, read_session(run).offsets, choice)
    printer = Printer(sys.stdout)
    printer.print(merged(sources, since=since, last=tail, wanted=wanted), sources)


def follow_logs(run: RunDir, choice: LogSelection, wanted: Wanted, since: float | None, tail: int | None) -> None:
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
        print(f"the run is lost; launcher why {run.path} reports more", file=sys.stderr)


def matcher(grep: str | None) -> Wanted:
    if grep is None:
        return lambda _: True
    try:
        pattern = re.compile(grep)
    except re.error as error:
        raise RequestError(Problem(f"{grep!r} is not a regular expression: {error}", key="--grep")) from None
    return lambda line: pattern.search(line.text) is not None


def since_seconds(text: str | None, now: float) -> float | None:
    """The time of --since in seconds since the epoch. Raises RequestError if it is not a time."""
    if text is None:
        return None
    if match := _SINCE.match(text):
        return now - float(match[1]) * _UNITS[match[2]]
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        hint = "90s, 10m, 2h or 1d ago, or a time as 2026-03-01T12:30:00Z (UTC unless it has a time zone)"
        raise RequestError(Problem(f"{text!r} is not a time", key="--since", hint=hint)) from None
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()
