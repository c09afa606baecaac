"""How a run ended."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from launcher.errors import FailureCode


@dataclass(frozen=True)
class Outcome:
    """The final state, "finished" or "stopped", and the number of updates, None if a script did not report any.

    `reason` and `code` are set if the run stopped by itself; `reason` also if early stopping finished it.
    """

    state: Literal["finished", "stopped"]
    updates: int | None
    reason: str | None = None
    code: FailureCode | None = None


@dataclass(frozen=True)
class RunResult:
    """The result of a run. `exit_status` is that of the `launcher` command: 0 if the run finished."""

    directory: Path
    outcome: Outcome
    exit_status: int
