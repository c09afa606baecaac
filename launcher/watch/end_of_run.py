"""Detects the end of a run that is being watched."""

from __future__ import annotations

import time

from launcher.run_dir import ENDED, RunDir
from launcher.watch.run_session import Record, is_removed, read_json, run_removed, supervisor_ended
from launcher.watch.status import LOST, LOST_SECONDS, read_status_without_nodes

QUIET_SECONDS = 1.5
_CHECK_SECONDS = 1.0
_HEARTBEAT_CHECK_SECONDS = 10.0


class EndOfRun:
    """Detects that the run has ended or is lost, and that its files no longer grow.

    `state` is the final state, None before. Reads state.json and the lock at most once per second, and heartbeats if no
    line came for a minute. Raises RunFailed if the run directory was removed.
    """

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._checked = self._checked_heartbeats = float("-inf")
        self.state: str | None = None

    def reached(self, quiet_seconds: float) -> bool:
        """Whether the run has ended; `quiet_seconds` is the time since one of its files last grew."""
        now = time.monotonic()
        if self.state is None and now - self._checked >= _CHECK_SECONDS:
            self._checked = now
            state = read_json(self._run.state_file) or {}
            self.state = self._ended(state) or self._lost(state, quiet_seconds, now)
        return self.state is not None and quiet_seconds >= QUIET_SECONDS

    def _ended(self, written: Record) -> str | None:
        state = written.get("state")
        if state is None and is_removed(self._run):
            raise run_removed(self._run)
        return state if state in ENDED else None

    def _lost(self, state: Record, quiet_seconds: float, now: float) -> str | None:
        if supervisor_ended(self._run, state):
            return LOST
        due = quiet_seconds >= LOST_SECONDS and now - self._checked_heartbeats >= _HEARTBEAT_CHECK_SECONDS
        # The first check always runs: it finds a run that was lost long ago.
        if not due and self._checked_heartbeats != float("-inf"):
            return None
        self._checked_heartbeats = now
        return LOST if read_status_without_nodes(self._run, time.time()).state == LOST else None
