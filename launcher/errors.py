"""What can go wrong, as a small tree: a bad request (exit status 2) or a failed run (exit status 1)."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass


class LauncherError(Exception):
    """Anything the launcher tells its user without a traceback."""

    exit_status = 1


@dataclass(frozen=True)
class Problem:
    """One thing to fix: where it stands, what was found, what would be right."""

    message: str
    file: str | None = None
    line: int | None = None
    key: str | None = None
    hint: str | None = None

    def __str__(self) -> str:
        place = self.file or ""
        if self.line is not None:
            place += f":{self.line}"
        head = ": ".join(part for part in (place, self.key, self.message) if part)
        return f"{head}\n    {self.hint}" if self.hint else head


class RequestError(LauncherError):
    """A bad request: nothing was started, and the user can fix every problem listed."""

    exit_status = 2

    def __init__(self, *problems: Problem | str) -> None:
        self.problems = tuple(p if isinstance(p, Problem) else Problem(p) for p in problems)
        super().__init__("\n".join(str(p) for p in self.problems))


class RunFailed(LauncherError):
    """A run that was started and did not finish."""


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its kind where it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name that `name` most likely meant, or None where nothing is close."""
    matches = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.6)
    return matches[0] if matches else None
