"""Telling the failure that began it from those that only followed, when one rank takes all others with it."""

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
_AT_ONCE_SECONDS = 2.0
"""Failures this close together may have been noticed in another order than they happened."""
_TIME_OUTS = (
    r"Watchdog caught collective operation timeout",
    r"due to (?:a )?collective timeout",
    r"Timed out waiting \d+ms for (?:recv|send) operation",
    r"Application timeout caused pair closure",
)
TIMED_OUT = re.compile("|".join(_TIME_OUTS))
"""What a rank says that waited in a collective for longer than it may."""
LOST_PEER = re.compile(
    "|".join(
        (
            *_TIME_OUTS,
            r"Connection (?:closed|reset) by (?:remote )?peer",
            r"remote process exited or there was a network error",
            r"Some NCCL operations have failed or timed out",
            r"NCCL communicator (?:was|is) aborted",
            r"failed to recv, got 0 bytes",
            r"(?:gloo|c10d|TCPStore|ProcessGroup|NCCL)[^\n]*(?:Broken pipe|Socket closed|Connection refused)",
        )
    )
)
"""What a rank says that waited for others in a collective when one of them went away."""
TRACEBACK = "Traceback (most recent call last)"
_BY_RANK = re.compile(r"^\[rank\d+\]: ?")
_RAISED = re.compile(r"^(?:\[rank\d+\]: ?)?[A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Exit|Step|Failed)\b")
LOG_LINES = 300
"""How far back in a log the end of a rank is looked for: C++ adds the stacks of all its threads."""


class ObservedFailure(Protocol):
    """A failure as it was noticed: when (seconds since the epoch, None if unknown), the exit status, and what was said.

    The exit status is negative for a signal, and None for a node, or while the rank has not ended.
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
    """What an exit status alone says of a failure."""
    return FailureCode.UNKNOWN if exit_code is None else _EXIT_CODES.get(exit_code, FailureCode.UNKNOWN)


def was_terminated(exit_code: int | None) -> bool:
    """Whether a rank ended because it was told to, or because its agent was gone."""
    return code_of_exit(exit_code) in (FailureCode.ENDED, FailureCode.AGENT_LOST)


def code_of_collective(noticed: ObservedFailure) -> FailureCode:
    """The code of a failure in a collective; unknown if it was none."""
    if timed_out(noticed):
        return FailureCode.TIMEOUT
    return FailureCode.PEER_LOST if lost_peer(noticed) else FailureCode.UNKNOWN


def find_first(noticed: Sequence[F]) -> F:
    """The first in time; but not one that only lost a peer, where that peer's own failure was noticed right after."""
    begun = noticed[0]
    for one in noticed:
        near = one.time is None or begun.time is None or one.time - begun.time <= _AT_ONCE_SECONDS
        if near and not lost_peer(one) and not was_terminated(one.exit_code):
            return one
    return begun


def lost_peer(noticed: ObservedFailure) -> bool:
    """Whether it fell in a collective because another one had gone."""
    return any(LOST_PEER.search(text) for text in (noticed.error, noticed.traceback) if text)


def only_timeouts(noticed: Sequence[ObservedFailure]) -> bool:
    """Whether nothing failed but a collective that some waited in for too long: the cause is a rank not among them."""
    waited = [one for one in noticed if not was_terminated(one.exit_code) or one.error]
    return any(map(timed_out, waited)) and all(map(lost_peer, waited))


def timed_out(noticed: ObservedFailure) -> bool:
    """Whether it says that it waited in a collective for too long."""
    return any(TIMED_OUT.search(text) for text in (noticed.error, noticed.traceback) if text)


def ended_by_itself(exit_code: int | None) -> bool:
    """Whether a rank with this exit status may have failed in a collective: it exited itself, or C++ aborted it."""
    if exit_code is None or was_terminated(exit_code):
        return False
    return exit_code >= 0 or exit_code == -signal.SIGABRT


def collective_error_in_log(lines: Sequence[str]) -> str | None:
    """The last line of a log that tells of a collective that fell; None where there is none, or a Python traceback."""
    if any(TRACEBACK in line for line in lines):
        return None
    for pattern in (TIMED_OUT, LOST_PEER):
        for line in reversed(lines):
            if pattern.search(line):
                return line.strip()
    return None


def error_in_log(lines: Sequence[str], exit_code: int | None) -> tuple[str | None, str | None]:
    """(error, traceback) at the end of the log of a rank with this exit status; None for what it does not have."""
    traceback = last_traceback(lines)
    if traceback is None:
        return (collective_error_in_log(lines) if ended_by_itself(exit_code) else None), None
    raised = [line for line in traceback.splitlines() if _RAISED.match(line)]
    return (_BY_RANK.sub("", raised[-1]) if raised else None), traceback


def traceback_time(lines: Sequence[str], exit_code: int | None) -> float | None:
    """When the last traceback of a log, with its times, was begun: seconds since the epoch by its node's clock.

    None where there is none, and where something else ended the rank. A process may end much later than it raises, and
    after those that fell because of it.
    """
    starts = [line for line in lines if TRACEBACK in line]
    if not starts or not ended_by_itself(exit_code):
        return None
    try:
        return datetime.fromisoformat(starts[-1].partition(" ")[0]).timestamp()
    except ValueError:
        return None


def last_traceback(lines: Sequence[str]) -> str | None:
    """The lines from the last traceback's beginning to the exception; None where there is none."""
    starts = [number for number, line in enumerate(lines) if TRACEBACK in line]
    if not starts:
        return None
    for end in range(starts[-1] + 1, len(lines)):
        if _RAISED.match(lines[end]):
            return "\n".join(lines[starts[-1] : end + 1])
    return "\n".join(lines[starts[-1] :])


class Place(NamedTuple):
    """A rank on its node; a whole node where `rank` is None."""

    rank: int | None
    node_rank: int
    host: str


def timeout_headline(absent: Sequence[Place] | None) -> str:
    """What happened where a collective timed out, and nothing else failed; `absent` is None where it is not known."""
    if absent is None:
        return "a collective timed out; which ranks did not come to it is not known"
    if not absent:
        return "a collective timed out on every rank: they were not in the same one, or the network is stuck"
    return f"a collective timed out; these ranks did not come to it: {describe_places(absent)}"


def describe_places(places: Iterable[Place], most: int = 6) -> str:
    """Which ranks, by node: ranks 0-3 on node 0 (h1), rank 5 on node 1 (h2)."""
    ordered = sorted(places, key=lambda one: (one.node_rank, one.host, -1 if one.rank is None else one.rank))
    groups = [
        (f"node {node} ({host})", [one.rank for one in group if one.rank is not None])
        for (node, host), group in groupby(ordered, key=lambda one: (one.node_rank, one.host))
    ]
    words = [f"{_ranks(ranks)} on {node}" if ranks else node for node, ranks in groups[:most]]
    return ", ".join(words) + (f" and on {len(groups) - most} more nodes" if len(groups) > most else "")


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
