"""When a run that is watched has come to its end."""

from __future__ import annotations

import time

from launcher.run_dir import ENDED, RunDir
from launcher.watch.session import Record, gone, is_gone, read_json, supervisor_gone
from launcher.watch.status import LOST, LOST_SECONDS, read_brief

QUIET_SECONDS = 1.5
_LOOK_SECONDS = 1.0
_LOST_LOOK_SECONDS = 10.0


class EndOfRun:
    """Says when the run has ended, or is lost, and its files have been quiet. `state` is what it came to, None before.

    Raises RunFailed where the run directory is gone.

    Looks at state.json and the lock once a second at most, and for signs of life if nothing came for a minute.
    """

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._looked = self._looked_for_life = float("-inf")
        self.state: str | None = None

    def reached(self, quiet_seconds: float) -> bool:
        """Whether it has, where its files have been quiet for so long."""
        now = time.monotonic()
        if self.state is None and now - self._looked >= _LOOK_SECONDS:
            self._looked = now
            state = read_json(self._run.state_file) or {}
            self.state = self._ended(state) or self._lost(state, quiet_seconds, now)
        return self.state is not None and quiet_seconds >= QUIET_SECONDS

    def _ended(self, written: Record) -> str | None:
        state = written.get("state")
        if state is None and is_gone(self._run):
            raise gone(self._run)
        return state if state in ENDED else None

    def _lost(self, state: Record, quiet_seconds: float, now: float) -> str | None:
        if supervisor_gone(self._run, state):
            return LOST
        due = quiet_seconds >= LOST_SECONDS and now - self._looked_for_life >= _LOST_LOOK_SECONDS
        # A run that was lost long ago is seen at the first look.
        if not due and self._looked_for_life != float("-inf"):
            return None
        self._looked_for_life = now
        return LOST if read_brief(self._run, time.time()).state == LOST else None
