"""Printing the log lines of a run, past ones or as they come."""

from __future__ import annotations

import re
import sys
from datetime import UTC, datetime

from launcher.errors import Problem, RequestError
from launcher.run_dir import RunDir
from launcher.watch.end_of_run import EndOfRun
from launcher.watch.follow import Follower
from launcher.watch.lines import Wanted, merged
from launcher.watch.print_lines import Printer
from launcher.watch.session import read_session
from launcher.watch.sources import Choice, Source, check_choice, check_expected, sources_of
from launcher.watch.status import LOST

FOLLOWED_FROM = 100
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_SINCE = re.compile(r"^(\d+(?:\.\d+)?)([smhd])$")


def print_logs(run: RunDir, choice: Choice, wanted: Wanted, since: float | None, tail: int | None) -> None:
    check_choice(run, choice)
    sources = sources_of(run, read_session(run).offsets, choice)
    printer = Printer(sys.stdout)
    printer.print(merged(sources, since=since, last=tail, wanted=wanted), sources)


def follow_logs(run: RunDir, choice: Choice, wanted: Wanted, since: float | None, tail: int | None) -> None:
    def find() -> list[Source]:
        session = read_session(run)
        found = sources_of(run, session.offsets, choice)
        if not found:
            check_expected(run, session, choice)
        return found

    follower = Follower(find)
    end, printer = EndOfRun(run), Printer(sys.stdout)
    if tail is None and since is None:
        tail = FOLLOWED_FROM
    past = merged(follower.sources, since=since, last=tail, wanted=wanted, ends=follower.ends)
    printer.print(past, follower.sources)
    for lines in follower.batches(lambda: end.reached(follower.quiet_seconds)):
        printer.print(filter(wanted, lines), follower.sources)
    if end.state == LOST:
        print(f"the run is lost; launcher why {run.path} reports more", file=sys.stderr)


def matcher(grep: str | None) -> Wanted:
    if grep is None:
        return lambda _: True
    try:
        pattern = re.compile(grep)
    except re.error as error:
        raise RequestError(Problem(f"{grep!r} is no regular expression: {error}", key="--grep")) from None
    return lambda line: pattern.search(line.text) is not None


def since_seconds(text: str | None, now: float) -> float | None:
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
