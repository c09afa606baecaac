"""What went wrong first: a pure function of what the ranks reported."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from launcher.errors import FailureCode, known_code
from launcher.first_failure import code_of_exit, find_first


@dataclass(frozen=True)
class Failure:
    """A rank that failed (None for a whole node that was lost), and how. `time` is in seconds since the epoch.

    `how` is for people. `exit_code` is negative for a signal, and None before the exit is known. `code` is what the
    rank itself reported, else what its exit status says.
    """

    rank: int | None
    node_rank: int
    time: float
    how: str
    error: str | None = None
    traceback: str | None = None
    exit_code: int | None = None
    code: FailureCode = FailureCode.UNKNOWN


def first_failure(events: Iterable[dict[str, Any]]) -> Failure | None:
    """The failure that began it; those that only fell after it are not the cause."""
    return next(iter(all_failures(events)), None)


def all_failures(events: Iterable[dict[str, Any]], clock_offsets: Sequence[float] = ()) -> list[Failure]:
    """Every rank's failure: that which began it, then the others in order of time.

    Times are corrected by how far the clock of each node is ahead.

    A rank tells an exception before it lets go of its peers, so the time of that report counts rather than its exit's.
    """
    failures: dict[Any, Failure] = {}
    for event in events:
        found = _failure(event)
        if found is None:
            continue
        if clock_offsets and found.rank is not None:
            found = replace(found, time=round(found.time - clock_offsets[found.node_rank], 3))
        key = ("node", found.node_rank) if found.rank is None else found.rank
        known = failures.get(key)
        if known is None:
            failures[key] = found
        elif (known.error is None) != (found.error is None):
            told, ended = (known, found) if found.error is None else (found, known)
            failures[key] = replace(told, how=ended.how, exit_code=ended.exit_code)
    return in_order(failures.values())


def in_order(failures: Iterable[Failure]) -> list[Failure]:
    """That which began it, then the others in order of time."""
    ordered = sorted(failures, key=lambda failure: failure.time)
    first = find_first(ordered) if ordered else None
    return sorted(ordered, key=lambda failure: failure is not first)


def describe_exit(code: int) -> str:
    """An exit status in words: a code, or the signal's name."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"


def _failure(event: dict[str, Any]) -> Failure | None:
    kind, node = event["report"], event.get("node_rank", 0)
    if kind == "failed":
        text = f"{event['error']}: {event['message']}"
        code = known_code(event.get("code")) or FailureCode.UNKNOWN
        return Failure(event["rank"], node, event["time"], "an exception", text, event.get("traceback"), code=code)
    if kind == "exit" and event["code"] != 0:
        exit_code = event["code"]
        how, code = describe_exit(exit_code), code_of_exit(exit_code)
        return Failure(event["rank"], node, event["time"], how, exit_code=exit_code, code=code)
    if kind == "node-lost":
        how = f"the node's agent is gone: {event['message']}"
        return Failure(None, node, event["time"], how, code=FailureCode.NODE_LOST)
    return None
