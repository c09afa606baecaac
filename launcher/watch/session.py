"""What a run directory says of its run at this moment: the state, the nodes it has now, and how it failed."""

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

__all__ = ["Record", "parsed", "read_json", "records"]

Record = dict[str, Any]
records, parsed = read_lines, parse_lines


@dataclass(frozen=True)
class Session:
    """The state as state.json has it, and what events.jsonl tells of the time since the run was last placed.

    `nodes` are the "node" events by (node rank, host). `offsets` has for each log folder ever named how many seconds
    that node's clock is ahead of the supervisor's. `began` is the time of the run's first event. `failure` is the last
    "failure" event of this time, None without one. `last_phase` is the last state before the run ended.
    """

    state: Record
    began: float | None = None
    placed: float | None = None
    heard: float | None = None
    nodes: dict[tuple[int, str], Record] = field(default_factory=dict)
    offsets: dict[str, float] = field(default_factory=dict)
    failure: Record | None = None
    last_phase: str = "planning"

    @property
    def name(self) -> str:
        """The state's name; "unknown" where there is no state.json."""
        return str(self.state.get("state", "unknown"))

    @property
    def ended(self) -> bool:
        return self.name in ENDED


def read_session(run: RunDir) -> Session:
    """The session of a run; whatever is missing or damaged is left out."""
    began, placed, heard = None, None, None
    nodes: dict[tuple[int, str], Record] = {}
    offsets: dict[str, float] = {}
    failure: Record | None = None
    phase = "planning"
    for event in records(run.events_file):
        heard = seconds_of(event.get("time")) or heard
        began = began or heard
        kind = event.get("event")
        if kind == "resume" or (kind == "state" and event.get("state") == "placing"):
            nodes, failure, placed = {}, None, heard
        elif kind == "node":
            rank, host = whole_of(event.get("node_rank")), text_of(event.get("host"))
            if rank is None or host is None:
                continue
            nodes[rank, host] = event
            offsets[run.node_logs(rank, host).name] = number_of(event.get("clock_offset_seconds")) or 0.0
        elif kind == "failure":
            failure = event
        if kind == "state" and event.get("state") not in ENDED:
            phase = str(event.get("state"))
    return Session(read_json(run.state_file) or {}, began, placed, heard, nodes, offsets, failure, phase)


def is_gone(run: RunDir) -> bool:
    """Whether the run directory is no longer there."""
    try:
        run.path.stat()
    except OSError as error:
        return error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)
    return False


def gone(run: RunDir) -> RunFailed:
    """What is told of a run that was removed while it was watched."""
    return RunFailed(f"the run is gone: {run.path} was removed while it was watched")


def seconds_of(time: Any) -> float | None:
    """Seconds since the epoch of a time as the run's files write it; None where it is none."""
    try:
        return datetime.fromisoformat(time).timestamp()
    except (TypeError, ValueError, OverflowError, OSError):
        return None


def number_of(value: Any) -> float | None:
    """A finite number from a file of the run; None for anything else, as damage leaves it."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return value if math.isfinite(value) else None
    except OverflowError:  # an integer beyond every float
        return None


def whole_of(value: Any) -> int | None:
    """A whole number from a file of the run; None for anything else."""
    return int(value) if isinstance(value, int) and number_of(value) is not None else None


def text_of(value: Any) -> str | None:
    """A text from a file of the run, without what cannot be printed; None for anything else."""
    return value.encode(errors="replace").decode() if isinstance(value, str) else None


def touched(run: RunDir) -> float | None:
    """When the launcher at work last touched its lock, by the file system's clock."""
    try:
        return run.lock_file.stat().st_mtime
    except OSError:
        return None


def supervisor_gone(run: RunDir, state: Record) -> bool:
    """Whether the launcher that wrote this state surely ended: it was on this host, and nobody holds the run.

    From another host a free lock may only mean that locks are not seen there: then its heartbeat decides.
    """
    return state.get("host") == socket.gethostname() and is_held(run) is False


def is_held(run: RunDir) -> bool | None:
    """Whether a launcher works in the run directory; None if that cannot be known from here."""
    try:
        with run.lock_file.open("rb") as lock:
            # A shared lock can be asked for without the right to write.
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except OSError:
        return None
    return False
