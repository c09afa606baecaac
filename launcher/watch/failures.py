"""The failed ranks of a run by role: the first, those with the same error, those that lost a peer, and others."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from launcher.errors import FailureCode, known_code
from launcher.files import last_lines, strip_times
from launcher.first_failure import (
    LOG_LINES,
    Place,
    code_of_exit,
    error_in_log,
    find_first,
    lost_peer,
    only_timeouts,
    timed_out,
    was_terminated,
)
from launcher.run_dir import RunDir, rank_log_name
from launcher.watch import runs_without_codes
from launcher.watch.run_session import Record, int_of, number_of, text_of


@dataclass(frozen=True)
class Failed:
    """A failed rank, or a lost node (rank None). `time` is by the supervisor's clock, None if unknown.

    `exit_code` is negative for a signal. `how` describes the end in words.
    """

    rank: int | None
    node_rank: int
    host: str
    time: float | None
    how: str
    error: str | None = None
    traceback: str | None = None
    exit_code: int | None = None
    code: FailureCode = FailureCode.UNKNOWN
    attempt: int = 1

    @property
    def log_name(self) -> str:
        """The name of its log in the node's log folder."""
        return "agent.log" if self.rank is None else rank_log_name(self.rank, self.attempt)

    @property
    def name(self) -> str:
        node = f"node {self.node_rank} ({self.host})"
        return node if self.rank is None else f"rank {self.rank} on {node}"

    @property
    def place(self) -> Place:
        return Place(self.rank, self.node_rank, self.host)

    @property
    def reported(self) -> str:
        """The error and the traceback as one text; empty if neither is known."""
        return "\n".join(text for text in (self.error, self.traceback) if text)


@dataclass(frozen=True)
class Failures:
    """The failures of a run, in roles.

    `same` have the first one's error, `followers` lost a peer in a collective, `terminated` were ended with the run.
    `only_timeouts`: the only failure is a collective that timed out on the first and the followers.
    """

    first: Failed
    same: tuple[Failed, ...] = ()
    followers: tuple[Failed, ...] = ()
    terminated: tuple[Failed, ...] = ()
    others: tuple[Failed, ...] = ()
    only_timeouts: bool = False


def read_failures(event: Record, run: RunDir) -> Failures:
    """The failures in a "failure" event, in roles."""
    failures = event.get("failures")
    listed = [one for one in failures if isinstance(one, dict)] if isinstance(failures, list) else []
    attempt = int_of(event.get("attempt")) or 1
    found = [_with_log(replace(_failed(one), attempt=attempt), run) for one in listed or [event]]
    timeouts = only_timeouts(found)
    first = next(filter(timed_out, found)) if timeouts else find_first(found)
    hosts = sorted({one.host for one in found}, key=len, reverse=True)
    key = "" if timeouts else normalised(_key(first), hosts)
    roles: dict[str, list[Failed]] = defaultdict(list)
    for one in found:
        if one is not first:
            roles[_role(one, key, hosts)].append(one)
    return Failures(
        first,
        same=tuple(roles["same"]),
        followers=tuple(roles["followers"]),
        terminated=tuple(roles["terminated"]),
        others=tuple(roles["others"]),
        only_timeouts=timeouts,
    )


def _failed(record: Record) -> Failed:
    how, error = text_of(record.get("how")) or "in an unknown way", text_of(record.get("error"))
    exit_code = int_of(record["exit_code"]) if "exit_code" in record else runs_without_codes.exit_code_of(how)
    code = known_code(record.get("code"))
    if code is None:
        code = code_of_exit(exit_code) if error is None else runs_without_codes.code_of(error)
        code = runs_without_codes.code_of(how) if code is FailureCode.UNKNOWN else code
    return Failed(
        rank=int_of(record.get("rank")),
        node_rank=int_of(record.get("node_rank")) or 0,
        host=text_of(record.get("host")) or "?",
        time=number_of(record.get("time")),
        how=how,
        error=error,
        traceback=text_of(record.get("traceback")),
        exit_code=exit_code,
        code=code,
    )


def _with_log(failed: Failed, run: RunDir) -> Failed:
    """Adds the exception at the end of the rank's log if the rank did not report one: a script, or an abort in C++."""
    if failed.rank is None or failed.reported:
        return failed
    error, traceback = error_in_log(log_end(run, failed, LOG_LINES), failed.exit_code)
    return replace(failed, error=error, traceback=traceback)


def log_end(run: RunDir, failed: Failed, count: int) -> list[str]:
    """The last lines of a failed rank's log, or of a lost node's agent log, without times."""
    return strip_times(last_lines(run.node_logs(failed.node_rank, failed.host) / failed.log_name, count))


def _role(failed: Failed, key: str, hosts: Sequence[str]) -> str:
    if key and normalised(_key(failed), hosts) == key:
        return "same"
    if lost_peer(failed):
        return "followers"
    return "terminated" if was_terminated(failed.exit_code) and not failed.reported else "others"


def _key(failed: Failed) -> str:
    return failed.traceback or failed.error or ""


def normalised(text: str, hosts: Sequence[str] = ()) -> str:
    """A traceback without what differs between ranks with the same failure: numbers, addresses, ids, hosts.

    Line numbers stay.
    """
    for host in hosts:
        text = re.sub(rf"(?<![\w.-]){re.escape(host)}(?![\w-])", "<host>", text)
    text = re.sub(r"0x[0-9a-fA-F]+|\b(?=[0-9a-f]*\d)[0-9a-f]{8,}\b", "#", text)
    return re.sub(r"(?<!, line )(?<!\d)\d+(?:[.:]\d+)*", "#", text)
