"""Paths from the user, in which ~ is a home directory."""

from __future__ import annotations

import os
from pathlib import Path

from launcher.errors import Problem, RequestError

_LONGEST_NAME, _LONGEST_PATH = 255, 4095
"""In bytes; Linux: NAME_MAX, and PATH_MAX without the final zero."""


def user_path(text: str | Path, key: str | None = None) -> Path:
    """The path, with ~ or ~NAME replaced by that user's home directory.

    Raises RequestError for an unknown user, and for a path that is too long.
    """
    try:
        path = Path(text).expanduser()
    except RuntimeError:
        name = Path(text).parts[0]
        found = f"{text}: the home directory {name} is unknown"
        raise RequestError(Problem(found, key=key, hint=f"write ./{name} for a folder with that name")) from None
    longest = max((len(os.fsencode(part)) for part in path.parts), default=0)
    if longest > _LONGEST_NAME or len(os.fsencode(path)) > _LONGEST_PATH:
        hint = f"a name may have {_LONGEST_NAME} bytes, and a path {_LONGEST_PATH}"
        raise RequestError(Problem(f"File name too long: {str(path)[:40]}…", key=key, hint=hint))
    return path
