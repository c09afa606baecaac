"""The ranks that failed: which one began it, which only repeat it, and which fell because of it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from launcher.errors import FailureCode, known_code
from launcher.first_failure import (
    LOG_LINES,
    Place,
    code_of_exit,
    fell,
    first_of,
    only_timed_out,
    said,
    timed_out,
    was_ended,
)
from launcher.run_dir import RunDir
from launcher.tail import last_lines, untimed
from launcher.watch import runs_without_codes
from launcher.watch.session import Record, number_of, text_of, whole_of


@dataclass(frozen=True)
class Failed:
    """A rank that failed, or a node that was lost (rank None). `time` is by the supervisor's clock, None if unknown.

    `exit_code` is negative for a signal. `code` says what kind of failure it is.
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

    @property
    def name(self) -> str:
        node = f"node {self.node_rank} ({self.host})"
        return node if self.rank is None else f"rank {self.rank} on {node}"

    @property
    def place(self) -> Place:
        return Place(self.rank, self.node_rank, self.host)

    @property
    def told(self) -> str:
        """What it reported of itself."""
        return "\n".join(text for text in (self.error, self.traceback) if text)


@dataclass(frozen=True)
class Failures:
    """The failures of a run: the first, those with the same error, those that fell because of it, and others.

    `waited` where nothing but a collective failed, in which the first and the followers waited for too long.
    """

    first: Failed
    same: tuple[Failed, ...] = ()
    followers: tuple[Failed, ...] = ()
    ended: tuple[Failed, ...] = ()
    others: tuple[Failed, ...] = ()
    waited: bool = False


def failures_of(event: Record, run: RunDir) -> Failures:
    """The failures that a "failure" event tells of, in their roles."""
    failures = event.get("failures")
    listed = [one for one in failures if isinstance(one, dict)] if isinstance(failures, list) else []
    found = [_with_log(_failed(one), run) for one in listed or [event]]
    waited = only_timed_out(found)
    first = next(filter(timed_out, found)) if waited else first_of(found)
    hosts = sorted({one.host for one in found}, key=len, reverse=True)
    key = "" if waited else normalised(_key(first), hosts)
    roles: dict[str, list[Failed]] = defaultdict(list)
    for one in found:
        if one is not first:
            roles[_role(one, key, hosts)].append(one)
    return Failures(
        first,
        same=tuple(roles["same"]),
        followers=tuple(roles["followers"]),
        ended=tuple(roles["ended"]),
        others=tuple(roles["others"]),
        waited=waited,
    )


def _failed(record: Record) -> Failed:
    how, error = text_of(record.get("how")) or "in an unknown way", text_of(record.get("error"))
    exit_code = whole_of(record["exit_code"]) if "exit_code" in record else runs_without_codes.exit_code_of(how)
    code = known_code(record.get("code"))
    if code is None:
        code = code_of_exit(exit_code) if error is None else runs_without_codes.code_of(error)
        code = runs_without_codes.code_of(how) if code is FailureCode.UNKNOWN else code
    return Failed(
        rank=whole_of(record.get("rank")),
        node_rank=whole_of(record.get("node_rank")) or 0,
        host=text_of(record.get("host")) or "?",
        time=number_of(record.get("time")),
        how=how,
        error=error,
        traceback=text_of(record.get("traceback")),
        exit_code=exit_code,
        code=code,
    )


def _with_log(failed: Failed, run: RunDir) -> Failed:
    """With the exception at the end of its log, where the rank did not tell it: a script, or one that C++ ended."""
    if failed.rank is None or failed.told:
        return failed
    error, traceback = said(log_end(run, failed, LOG_LINES), failed.exit_code)
    return replace(failed, error=error, traceback=traceback)


def log_end(run: RunDir, failed: Failed, count: int) -> list[str]:
    """The last lines of a failed rank's log, without their times; of a lost node's its agent's."""
    name = "agent" if failed.rank is None else f"rank-{failed.rank}"
    return untimed(last_lines(run.node_logs(failed.node_rank, failed.host) / f"{name}.log", count))


def _role(failed: Failed, key: str, hosts: Sequence[str]) -> str:
    if key and normalised(_key(failed), hosts) == key:
        return "same"
    if fell(failed):
        return "followers"
    return "ended" if was_ended(failed.exit_code) and not failed.told else "others"


def _key(failed: Failed) -> str:
    return failed.traceback or failed.error or ""


def normalised(text: str, hosts: Sequence[str] = ()) -> str:
    """A traceback without what differs between ranks that fail alike: numbers, addresses, ids, hosts.

    The numbers of lines stay.
    """
    for host in hosts:
        text = re.sub(rf"(?<![\w.-]){re.escape(host)}(?![\w-])", "<host>", text)
    text = re.sub(r"0x[0-9a-fA-F]+|\b(?=[0-9a-f]*\d)[0-9a-f]{8,}\b", "#", text)
    return re.sub(r"(?<!, line )(?<!\d)\d+(?:[.:]\d+)*", "#", text)
