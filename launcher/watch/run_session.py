"""A run's present session, read from its directory: the state, the nodes, and the failure."""

from __future__ import annotations

import errno
import fcntl
import math
import socket
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from launcher.errors import RunFailed
from launcher.files import parse_lines, read_json, read_lines
from launcher.run_dir import ENDED, RunDir
from launcher.watch.terminal_safe import plain

__all__ = ["Record", "parsed", "read_json", "records"]

Record = dict[str, Any]
records, parsed = read_lines, parse_lines


@dataclass(frozen=True)
class Session:
    """The record in state.json, and the events of events.jsonl since the run was last placed on nodes.

    Times are in seconds since the epoch; `start_time` is that of the run's first event. `nodes` are the "node" events
    by (node rank, host). `offsets` are the seconds by which a node's clock is ahead of the supervisor's, by log folder.
    `failure` is the session's last "failure" event, or None. `last_phase` is the last state before the run ended.
    `restarts` counts the restarts after failures since the run was last started or resumed; `no_restart` is the reason
    why there was no further one. `spares` are the hosts of spare nodes. `not_continued` is the reason why no Slurm job
    was submitted that continues the run.
    """

    state: Record
    start_time: float | None = None
    placed_time: float | None = None
    last_event_time: float | None = None
    nodes: dict[tuple[int, str], Record] = field(default_factory=dict)
    offsets: dict[str, float] = field(default_factory=dict)
    failure: Record | None = None
    last_phase: str = "planning"
    restarts: int = 0
    no_restart: str | None = None
    spares: tuple[str, ...] = ()
    not_continued: str | None = None

    @property
    def name(self) -> str:
        """The state's name; "unknown" without a state.json."""
        return plain(str(self.state.get("state", "unknown")))

    @property
    def ended(self) -> bool:
        return self.name in ENDED


def read_session(run: RunDir) -> Session:
    """The session of a run, without missing or damaged records."""
    start, placed, last = None, None, None
    nodes: dict[tuple[int, str], Record] = {}
    offsets: dict[str, float] = {}
    failure: Record | None = None
    spares: list[str] = []
    phase, restarts, no_restart, not_continued = "planning", 0, None, None
    for event in records(run.events_file):
        last = seconds_of(event.get("time")) or last
        start = start or last
        kind = event.get("event")
        if kind == "resume" or (kind == "state" and event.get("state") == "placing"):
            nodes, failure, placed, spares, not_continued = {}, None, last, [], None
        elif kind == "node":
            rank, host = int_of(event.get("node_rank")), text_of(event.get("host"))
            if rank is None or host is None:
                continue
            nodes[rank, host] = event
            offsets[run.node_logs(rank, host).name] = number_of(event.get("clock_offset_seconds")) or 0.0
        elif kind == "spare_node" and (host := text_of(event.get("host"))) is not None:
            spares.append(host)
        elif kind == "failure":
            failure = event
        elif kind == "no_restart":
            no_restart = text_of(event.get("reason"))
        elif kind == "not_continued":
            not_continued = text_of(event.get("reason"))
        if kind == "resume":
            restarts, no_restart = 0, None
        elif kind == "restart" and "attempt" in event:
            restarts += 1
        if kind == "state" and event.get("state") not in ENDED:
            phase = str(event.get("state"))
    state = read_json(run.state_file) or {}
    return Session(
        state=state,
        start_time=start,
        placed_time=placed,
        last_event_time=last,
        nodes=nodes,
        offsets=offsets,
        failure=failure,
        last_phase=phase,
        restarts=restarts,
        no_restart=no_restart,
        spares=tuple(spares),
        not_continued=not_continued,
    )


def continued_by(run: RunDir, state: Record) -> str | None:
    """The Slurm job that was submitted to continue a stopped run; None without one."""
    if state.get("state") != "stopped":
        return None
    record = read_json(run.continuation_file) or {}
    return text_of(record.get("job")) if record.get("continues") == state.get("slurm_job_id") else None


def is_removed(run: RunDir) -> bool:
    """Whether the run directory no longer exists."""
    try:
        run.path.stat()
    except OSError as error:
        return error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)
    return False


def run_removed(run: RunDir) -> RunFailed:
    """The error for a run that is removed while it is being watched."""
    return RunFailed(f"the run directory {run.path} was removed while it was being watched")


def seconds_of(time: Any) -> float | None:
    """A time from a file of the run, in seconds since the epoch; None for anything else."""
    try:
        return datetime.fromisoformat(time).timestamp()
    except (TypeError, ValueError, OverflowError, OSError):
        return None


def number_of(value: Any) -> float | None:
    """A finite number from a file of the run; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return value if math.isfinite(value) else None
    except OverflowError:  # an integer that is too large for a float
        return None


def int_of(value: Any) -> int | None:
    """An integer from a file of the run; None for anything else."""
    return int(value) if isinstance(value, int) and number_of(value) is not None else None


def text_of(value: Any) -> str | None:
    """A string from a file of the run, with unprintable characters replaced; None for anything else."""
    return value.encode(errors="replace").decode() if isinstance(value, str) else None


def lock_touch_time(run: RunDir) -> float | None:
    """When the launcher last touched its lock file: seconds since the epoch, by the file system's clock."""
    try:
        return run.lock_file.stat().st_mtime
    except OSError:
        return None


def supervisor_ended(run: RunDir, state: Record) -> bool:
    """Whether the launcher that wrote this state has certainly ended: it ran on this host, and the lock is free.

    On another host a free lock proves nothing, since locks may not be visible there: then the heartbeat decides.
    """
    return state.get("host") == socket.gethostname() and is_locked(run) is False


def is_locked(run: RunDir) -> bool | None:
    """Whether a launcher holds the lock of the run directory; None if this host cannot find out."""
    try:
        with run.lock_file.open("rb") as lock:
            # A shared lock needs no write permission.
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except OSError:
        return None
    return False
