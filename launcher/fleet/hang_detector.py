"""Detects a hang: a time without progress that is too long for what the run does. Pure: the caller gives the times."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Literal

from launcher.records import Phase

Setting = float | Literal["auto"]
"""The job's `train.hang_seconds`; 0: no hang is detected."""
FLOOR_SECONDS = 60.0
LONG_SECONDS = 1800.0
"""For work whose duration is not known: loading, the first update, an evaluation, a checkpoint, an export."""
_FACTOR = 10.0
_RECENT_UPDATES = 20
_CHECK_SECONDS = 10.0
"""The most that the time between two checks counts: a run that was suspended as a whole does not hang."""


@dataclass(frozen=True)
class Hang:
    """`seconds` without progress while the run was `doing` something, after `updates` updates."""

    seconds: float
    doing: str
    updates: int

    def __str__(self) -> str:
        return f"no progress for {self.seconds:.0f} s while {self.doing}, after {self.updates} updates"


@dataclass
class HangDetector:
    """Receives the progress of a run, and decides whether it hangs.

    Watches from the start of the ranks, or from the first update of a script. Between updates, "auto" allows 10 times
    the longest of the last 20 intervals, and at least 60 s; a number is the limit itself. Everything else, and a
    script, which does not report its evaluations and checkpoints, has at least 30 minutes.

    The phases and the updates reach the caller in two ways, so that one may be ahead of the other: what is older than
    what is known counts as progress, but does not change what the run is doing.
    """

    setting: Setting
    total_updates: int
    evaluates: bool = False
    eval_every: int | None = None
    script: bool = False
    _doing: str | None = None
    _updates: int = 0
    _made: int = 0
    _evaluated: int = -1
    _waited: float = 0.0
    _checked: float | None = None
    _intervals: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT_UPDATES))

    def __post_init__(self) -> None:
        self._doing = None if self.script else "loading"

    def switch_off(self) -> None:
        """From now on there is no limit: the caller ends the run in another way."""
        self.setting = 0

    def enter(self, phase: Phase, updates: int) -> None:
        """The run enters a phase after `updates` updates."""
        self._progress(self._doing if updates < self._updates else phase)
        self._updates = max(updates, self._updates)

    def update(self, update: int, step_seconds: object = None) -> None:
        """The run has made an update, counted from 0. `step_seconds` is used if it is a finite number."""
        # The first update after a start also compiles kernels and fills caches.
        if self._made:
            self._intervals.append(max(_seconds(step_seconds), self._waited))
        self._made += 1
        if self.script or update >= self._updates:
            self._updates = update + 1
            self._progress(self._after_update())
        else:
            self._progress(self._doing)

    def evaluated(self, updates: int) -> None:
        """The run has written an evaluation after `updates` updates."""
        self._evaluated = max(self._evaluated, updates)
        self._progress(self._after_update() if self._doing == "evaluating" else self._doing)

    def check(self, now: float) -> Hang | None:
        """The hang at `now` (seconds, on any clock), if there is one. To be called after progress was received."""
        passed = 0.0 if self._checked is None else now - self._checked
        self._checked = now
        self._waited += min(max(0.0, passed), _CHECK_SECONDS)
        limit = self.limit()
        if limit is None or self._doing is None or self._waited <= limit:
            return None
        return Hang(self._waited, self._doing, self._updates)

    def limit(self) -> float | None:
        """The seconds without progress that are allowed now; None: any number."""
        if self.setting == 0 or self._doing is None or (self.script and self._updates >= self.total_updates):
            return None
        number = 0.0 if self.setting == "auto" else self.setting
        learnt = _FACTOR * max(self._intervals, default=0.0)
        if self._doing != "training" or not self._made:
            return max(LONG_SECONDS, number, learnt)
        if number:
            return number
        return max(learnt, FLOOR_SECONDS if self._intervals and not self.script else LONG_SECONDS)

    def _after_update(self) -> str:
        if self.script:
            return "training"
        last = self._updates >= self.total_updates
        due = self.eval_every is not None and self._updates % self.eval_every == 0
        if self.evaluates and (due or last) and self._evaluated < self._updates:
            return "evaluating"
        return "ending" if last else "training"

    def _progress(self, doing: str | None) -> None:
        self._doing, self._waited = doing, 0.0


def _seconds(value: object) -> float:
    return value if isinstance(value, int | float) and math.isfinite(value) else 0.0
