"""Separates a run's first failure from those that followed: one failed rank makes all others fail."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable, Sequence
from datetime import datetime
from itertools import groupby
from typing import NamedTuple, Protocol, TypeVar

from launcher.errors import AGENT_LOST_EXIT, FailureCode

_EXIT_CODES = {
    -signal.SIGTERM: FailureCode.ENDED,
    AGENT_LOST_EXIT: FailureCode.AGENT_LOST,
    -signal.SIGKILL: FailureCode.RANK_KILLED,
    -signal.SIGSEGV: FailureCode.RANK_CRASHED,
    -signal.SIGBUS: FailureCode.RANK_CRASHED,
    -signal.SIGILL: FailureCode.RANK_CRASHED,
    -signal.SIGFPE: FailureCode.RANK_CRASHED,
}
_SAME_TIME_SECONDS = 2.0
"""Failures this close together may be observed in another order than they happened."""
_TIMEOUTS = (
    r"Watchdog caught collective operation timeout",
    r"due to (?:a )?collective timeout",
    r"Timed out waiting \d+ms for (?:recv|send) operation",
    r"Application timeout caused pair closure",
)
TIMED_OUT = re.compile("|".join(_TIMEOUTS))
"""The error of a rank whose collective timed out."""
LOST_PEER = re.compile(
    "|".join(
        (
            *_TIMEOUTS,
            r"Connection (?:closed|reset) by (?:remote )?peer",
            r"remote process exited or there was a network error",
            r"Some NCCL operations have failed or timed out",
            r"NCCL communicator (?:was|is) aborted",
            r"failed to recv, got 0 bytes",
            r"typically caused by a remote worker",
            r"(?:gloo|c10d|TCPStore|ProcessGroup|NCCL)[^\n]*(?:Broken pipe|Socket closed|Connection refused)",
        )
    )
)
"""The error of a rank whose collective failed because another rank was lost."""
TRACEBACK = "Traceback (most recent call last)"
_BY_RANK = re.compile(r"^\[rank\d+\]: ?")
_RAISED = re.compile(r"^(?:\[rank\d+\]: ?)?[A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Exit|Step|Failed)\b")
LOG_LINES = 300
"""How many lines at the end of a log are searched for an error: C++ adds the stacks of all its threads."""


class ObservedFailure(Protocol):
    """An observed failure. `time` is in seconds since the epoch, None if unknown.

    `exit_code` is negative for a signal, and None for a node or a rank that has not ended.
    """

    @property
    def time(self) -> float | None: ...

    @property
    def exit_code(self) -> int | None: ...

    @property
    def error(self) -> str | None: ...

    @property
    def traceback(self) -> str | None: ...


F = TypeVar("F", bound=ObservedFailure)


def code_of_exit(exit_code: int | None) -> FailureCode:
    """The code for an exit status alone; unknown if it does not determine one."""
    return FailureCode.UNKNOWN if exit_code is None else _EXIT_CODES.get(exit_code, FailureCode.UNKNOWN)


def was_terminated(exit_code: int | None) -> bool:
    """Whether a rank ended because of SIGTERM or the loss of its agent."""
    return code_of_exit(exit_code) in (FailureCode.ENDED, FailureCode.AGENT_LOST)


def code_of_collective(failure: ObservedFailure) -> FailureCode:
    """The code of a failure in a collective; unknown for any other failure."""
    if timed_out(failure):
        return FailureCode.TIMEOUT
    return FailureCode.PEER_LOST if lost_peer(failure) else FailureCode.UNKNOWN


def find_first(failures: Sequence[F]) -> F:
    """The first failure, given all in time order.

    If the earliest one only lost a peer or was terminated, the next real failure within 2 s of it counts as the first.
    """
    earliest = failures[0]
    for failure in failures:
        near = failure.time is None or earliest.time is None or failure.time - earliest.time <= _SAME_TIME_SECONDS
        if near and not lost_peer(failure) and not was_terminated(failure.exit_code):
            return failure
    return earliest


def lost_peer(failure: ObservedFailure) -> bool:
    """Whether a collective failed because another rank was lost, or did not join in time."""
    return any(LOST_PEER.search(text) for text in (failure.error, failure.traceback) if text)


def only_timeouts(failures: Sequence[ObservedFailure]) -> bool:
    """Whether the only failure is a collective that timed out: the cause is then a rank that did not fail."""
    own = [failure for failure in failures if not was_terminated(failure.exit_code) or failure.error]
    return any(map(timed_out, own)) and all(map(lost_peer, own))


def timed_out(failure: ObservedFailure) -> bool:
    """Whether a collective timed out."""
    return any(TIMED_OUT.search(text) for text in (failure.error, failure.traceback) if text)


def ended_by_itself(exit_code: int | None) -> bool:
    """Whether a rank exited by itself or was aborted in C++, so that its log may end with its error."""
    if exit_code is None or was_terminated(exit_code):
        return False
    return exit_code >= 0 or exit_code == -signal.SIGABRT


def collective_error_in_log(lines: Sequence[str]) -> str | None:
    """The last error of a collective in a log; None without one, or if the log has a Python traceback."""
    if any(TRACEBACK in line for line in lines):
        return None
    for pattern in (TIMED_OUT, LOST_PEER):
        for line in reversed(lines):
            if pattern.search(line):
                return line.strip()
    return None


def error_in_log(lines: Sequence[str], exit_code: int | None) -> tuple[str | None, str | None]:
    """(error, traceback) at the end of the log of a rank with this exit status; each None if the log has none."""
    traceback = last_traceback(lines)
    if traceback is None:
        return (collective_error_in_log(lines) if ended_by_itself(exit_code) else None), None
    raised = [line for line in traceback.splitlines() if _RAISED.match(line)]
    return (_BY_RANK.sub("", raised[-1]) if raised else None), traceback


def traceback_time(lines: Sequence[str], exit_code: int | None) -> float | None:
    """When a log's last traceback started, in seconds since the epoch by its node's clock; the lines need their times.

    None without a traceback, or if something else ended the rank. A process may end long after its exception, and after
    the ranks that lost it as a peer.
    """
    starts = [line for line in lines if TRACEBACK in line]
    if not starts or not ended_by_itself(exit_code):
        return None
    try:
        return datetime.fromisoformat(starts[-1].partition(" ")[0]).timestamp()
    except ValueError:
        return None


def last_traceback(lines: Sequence[str]) -> str | None:
    """The last traceback, from its first line to the exception, or None."""
    starts = [number for number, line in enumerate(lines) if TRACEBACK in line]
    if not starts:
        return None
    for end in range(starts[-1] + 1, len(lines)):
        if _RAISED.match(lines[end]):
            return "\n".join(lines[starts[-1] : end + 1])
    return "\n".join(lines[starts[-1] :])


class Place(NamedTuple):
    """A rank on its node; the whole node if `rank` is None."""

    rank: int | None
    node_rank: int
    host: str


def timeout_headline(absent: Sequence[Place] | None) -> str:
    """The headline for a collective that timed out while nothing else failed; `absent` is None if not known."""
    if absent is None:
        return "a collective timed out; it is not known which ranks did not join it"
    if not absent:
        return "a collective timed out on every rank: they were in different collectives, or the network is stuck"
    return f"a collective timed out; these ranks did not join it: {describe_places(absent)}"


def describe_places(places: Iterable[Place], most: int = 6) -> str:
    """Ranks by node as text: ranks 0-3 on node 0 (h1), rank 5 on node 1 (h2)."""
    ordered = sorted(places, key=lambda one: (one.node_rank, one.host, -1 if one.rank is None else one.rank))
    groups = [
        (f"node {node} ({host})", [one.rank for one in group if one.rank is not None])
        for (node, host), group in groupby(ordered, key=lambda one: (one.node_rank, one.host))
    ]
    parts = [f"{_ranks(ranks)} on {node}" if ranks else node for node, ranks in groups[:most]]
    return ", ".join(parts) + (f" and on {len(groups) - most} more nodes" if len(groups) > most else "")


def _ranks(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return "ranks " + ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
