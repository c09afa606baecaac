"""Whether data from YAML or JSON can be written as JSON and read again by any program."""

from __future__ import annotations

from typing import Any

_LARGEST = 1e308
"""Larger integers cannot be compared with floats or divided."""


def json_fault(value: Any, path: str = "") -> tuple[str, str] | None:
    """The dotted path and the reason of the first part that is not JSON; None if all parts are.

    A NaN or Inf is accepted: Python reads and writes them. Keys must be text, integers must fit a float, and text must
    be Unicode: half of a surrogate pair cannot be written to a file.
    """
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str) or not _is_unicode(key):
                return path, f"a key must be text, found {key!r}"
            if fault := json_fault(inner, f"{path}.{key}".lstrip(".")):
                return fault
        return None
    if isinstance(value, list | tuple):
        return next((fault for i, inner in enumerate(value) if (fault := json_fault(inner, f"{path}.{i}"))), None)
    reason = _scalar_fault(value)
    return (path, reason) if reason else None


def _scalar_fault(value: Any) -> str | None:
    if isinstance(value, str):
        return None if _is_unicode(value) else f"not Unicode text, found {value!r}"
    if value is None or isinstance(value, bool):
        return None
    if isinstance(value, float):
        return None
    if isinstance(value, int):
        return None if abs(value) < _LARGEST else "a number is too large"
    return f"must be text, a number, true, false, null, a list or a block, found {value!r}"


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
