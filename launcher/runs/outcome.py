"""How a run ended."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from launcher.errors import FailureCode


@dataclass(frozen=True)
class Outcome:
    """The run's last state, "finished" or "stopped", after `updates` updates; None if a script did not report any.

    A run that stopped by itself has a reason and its code.
    """

    state: Literal["finished", "stopped"]
    updates: int | None
    reason: str | None = None
    code: FailureCode | None = None


@dataclass(frozen=True)
class RunResult:
    """A run that was carried out. `exit_status` is that of the `launcher` command: 0 if the run finished."""

    directory: Path
    outcome: Outcome
    exit_status: int
