"""Paths from the user, in which ~ is a home directory."""

from __future__ import annotations

from pathlib import Path

from launcher.errors import Problem, RequestError


def user_path(text: str | Path, key: str | None = None) -> Path:
    """The path, with ~ or ~NAME replaced by that user's home directory. Raises RequestError for an unknown user."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        name = Path(text).parts[0]
        found = f"{text}: the home directory {name} is unknown"
        raise RequestError(Problem(found, key=key, hint=f"write ./{name} for a folder with that name")) from None
