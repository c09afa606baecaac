"""Paths from the user, in which ~ is a home directory."""

from __future__ import annotations

import os
from pathlib import Path

from launcher.errors import Problem, RequestError


def user_path(text: str | Path, key: str | None = None) -> Path:
    """The path, with ~ or ~NAME replaced by that user's home directory.

    Raises RequestError for an unknown user, and for what no file system accepts as a path.
    """
    try:
        return _checked(Path(text).expanduser(), key)
    except RuntimeError:
        name = Path(text).parts[0]
        found = f"{text}: the home directory {name} is unknown"
        raise RequestError(Problem(found, key=key, hint=f"write ./{name} for a folder with that name")) from None


_LONGEST_NAME, _LONGEST_PATH = 255, 4095
"""In bytes; Linux: NAME_MAX, and PATH_MAX without the final zero."""


def _checked(path: Path, key: str | None) -> Path:
    try:
        parts = [os.fsencode(part) for part in path.parts]
    except UnicodeEncodeError:
        raise RequestError(Problem(f"not a path: it is not Unicode text, found {str(path)!r}", key=key)) from None
    if max(map(len, parts), default=0) > _LONGEST_NAME or len(os.fsencode(path)) > _LONGEST_PATH:
        found = f"too long for a path: {str(path)[:40]}…"
        raise RequestError(Problem(found, key=key, hint=f"a name may have {_LONGEST_NAME} bytes"))
    return path
