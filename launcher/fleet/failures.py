"""The first failure: a pure function of the reports of the ranks."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from launcher.errors import FailureCode, known_code
from launcher.first_failure import code_of_exit, find_first
from launcher.records import FailedRank, Report


@dataclass(frozen=True)
class Failure:
    """The failure of a rank, or of a whole node (`rank` is None). `time` is in seconds since the epoch.

    `how` is for people. `exit_code` is negative for a signal, and None until the exit is known. `code` is the code that
    the rank reported, or one derived from its exit status.
    """

    rank: int | None
    node_rank: int
    time: float
    how: str
    error: str | None = None
    traceback: str | None = None
    exit_code: int | None = None
    code: FailureCode = FailureCode.UNKNOWN

    def record(self, host: str) -> FailedRank:
        """The failure as the failure event of events.jsonl lists it."""
        return {
            "rank": self.rank,
            "node_rank": self.node_rank,
            "time": self.time,
            "how": self.how,
            "error": self.error,
            "traceback": self.traceback,
            "exit_code": self.exit_code,
            "code": self.code,
            "host": host,
        }


def first_failure(reports: Iterable[Report]) -> Failure | None:
    """The failure that caused the others; None if nothing failed."""
    return next(iter(all_failures(reports)), None)


def all_failures(reports: Iterable[Report], clock_offsets: Sequence[float] = ()) -> list[Failure]:
    """Every rank's failure: first the one that caused the others, then the rest by time.

    `clock_offsets` is how far the clock of each node is ahead, in seconds; times are corrected by it.

    A rank reports an exception before its peers can notice, so the time of the report counts, not that of the exit.
    """
    failures: dict[tuple[str, int], Failure] = {}
    for report in reports:
        found = _failure(report)
        if found is None:
            continue
        if clock_offsets and found.rank is not None:
            found = replace(found, time=round(found.time - clock_offsets[found.node_rank], 3))
        key = ("node", found.node_rank) if found.rank is None else ("rank", found.rank)
        known = failures.get(key)
        if known is None:
            failures[key] = found
        elif (known.error is None) != (found.error is None):
            reported, ended = (known, found) if found.error is None else (found, known)
            failures[key] = replace(reported, how=ended.how, exit_code=ended.exit_code)
    return sort_failures(failures.values())


def sort_failures(failures: Iterable[Failure]) -> list[Failure]:
    """First the failure that caused the others, then the rest by time."""
    ordered = sorted(failures, key=lambda failure: failure.time)
    first = find_first(ordered) if ordered else None
    return sorted(ordered, key=lambda failure: failure is not first)


def describe_exit(code: int) -> str:
    """Describes an exit status: its code, or the name of the signal."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"


def _failure(report: Report) -> Failure | None:
    node, time = report.get("node_rank", 0), report["time"]
    if report["report"] == "failed":
        text = f"{report['error']}: {report['message']}"
        code = known_code(report.get("code")) or FailureCode.UNKNOWN
        return Failure(report["rank"], node, time, "an exception", text, report.get("traceback"), code=code)
    if report["report"] == "exit" and report["code"] != 0:
        exit_code = report["code"]
        how, code = describe_exit(exit_code), code_of_exit(exit_code)
        return Failure(report["rank"], node, time, how, exit_code=exit_code, code=code)
    if report["report"] == "node-lost":
        how = f"the node's agent is gone: {report['message']}"
        return Failure(None, node, time, how, code=FailureCode.NODE_LOST)
    return None
