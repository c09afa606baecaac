"""The ranks that failed: which one began it, which only repeat it, and which fell because of it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from launcher.aftermath import ENDED, fell, first_of
from launcher.run_dir import RunDir
from launcher.tail import last_lines
from launcher.watch.lines import STAMP_WIDTH
from launcher.watch.session import Record

_LOG_LINES = 120
_RAISED = re.compile(r"^(?:\[rank\d+\]: ?)?[A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Exit|Step|Failed)\b")


@dataclass(frozen=True)
class Failed:
    """A rank that failed, or a node that was lost (rank None). `time` is by the supervisor's clock, None if unknown."""

    rank: int | None
    node_rank: int
    host: str
    time: float | None
    how: str
    error: str | None = None
    traceback: str | None = None

    @property
    def name(self) -> str:
        node = f"node {self.node_rank} ({self.host})"
        return node if self.rank is None else f"rank {self.rank} on {node}"

    @property
    def told(self) -> str:
        """What it said of itself."""
        return "\n".join(text for text in (self.error, self.traceback) if text)


@dataclass(frozen=True)
class Failures:
    """The failures of a run: the first, those with the same error, those that fell because of it, and others."""

    first: Failed
    same: tuple[Failed, ...] = ()
    followers: tuple[Failed, ...] = ()
    ended: tuple[Failed, ...] = ()
    others: tuple[Failed, ...] = ()


def failures_of(event: Record, run: RunDir) -> Failures:
    """The failures that a "failure" event tells of, in their roles."""
    listed: list[Any] = event.get("failures") or [event]
    found = [_with_log(_failed(one), run) for one in listed if isinstance(one, dict)]
    first = first_of(found)
    hosts = sorted({one.host for one in found}, key=len, reverse=True)
    key = normalised(_key(first), hosts)
    roles: dict[str, list[Failed]] = defaultdict(list)
    for one in found:
        if one is not first:
            roles[_role(one, key, hosts)].append(one)
    return Failures(first, *(tuple(roles[role]) for role in ("same", "followers", "ended", "others")))


def _failed(record: Record) -> Failed:
    time = record.get("time")
    return Failed(
        rank=record.get("rank"),
        node_rank=int(record.get("node_rank") or 0),
        host=str(record.get("host", "?")),
        time=float(time) if isinstance(time, int | float) else None,
        how=str(record.get("how", "in an unknown way")),
        error=record.get("error"),
        traceback=record.get("traceback"),
    )


def _with_log(failed: Failed, run: RunDir) -> Failed:
    """With the exception at the end of its log, where the rank (a script of the user's own) did not tell it."""
    if failed.rank is None or failed.told:
        return failed
    traceback = last_traceback(log_end(run, failed, _LOG_LINES))
    if traceback is None:
        return failed
    raised = [line for line in traceback.splitlines() if _RAISED.match(line)]
    return replace(failed, error=raised[-1] if raised else None, traceback=traceback)


def log_end(run: RunDir, failed: Failed, count: int) -> list[str]:
    """The last lines of a failed rank's log, without their times; of a lost node's its agent's."""
    name = "agent" if failed.rank is None else f"rank-{failed.rank}"
    return untimed(last_lines(run.node_logs(failed.node_rank, failed.host) / f"{name}.log", count))


def untimed(lines: Iterable[str]) -> list[str]:
    """Log lines without their times."""
    return [line[STAMP_WIDTH + 1 :] if re.match(r"\d{4}-\d\d-\d\dT", line) else line for line in lines]


def last_traceback(lines: Sequence[str]) -> str | None:
    """The lines from the last traceback's beginning to the exception; None where there is none."""
    starts = [number for number, line in enumerate(lines) if "Traceback (most recent call last)" in line]
    if not starts:
        return None
    for end in range(starts[-1] + 1, len(lines)):
        if _RAISED.match(lines[end]):
            return "\n".join(lines[starts[-1] : end + 1])
    return "\n".join(lines[starts[-1] :])


def _role(failed: Failed, key: str, hosts: Sequence[str]) -> str:
    if key and normalised(_key(failed), hosts) == key:
        return "same"
    if fell(failed):
        return "followers"
    return "ended" if failed.how in ENDED and not failed.told else "others"


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


def where(failed: Iterable[Failed], most: int = 6) -> str:
    """Which ranks, by node: ranks 0-3 on node 0 (h1), rank 5 on node 1 (h2)."""
    ordered = sorted(failed, key=lambda one: (one.node_rank, one.host, -1 if one.rank is None else one.rank))
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
