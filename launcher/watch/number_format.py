"""Formats numbers and durations for display."""

from __future__ import annotations

GIB = 1024**3


def duration(seconds: float | None) -> str:
    """Seconds as text with at most two units: 42 s, 3 min 20 s, 2 h 5 min, 3 d 4 h; "?" for None."""
    if seconds is None:
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    for large, name, small, rest in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= large:
            left = whole % large // small
            return f"{whole // large} {name}" + (f" {left} {rest}" if left else "")
    raise AssertionError(whole)


def number(value: float | str | None, digits: str = ".4f") -> str:
    """A number in format `digits`; text (metrics.jsonl has text for NaN and Inf) unchanged; "-" for None."""
    if value is None:
        return "-"
    return value if isinstance(value, str) else format(value, digits)


def memory(used: float | None, total: float | None) -> str:
    """Used and total bytes in GiB, as "10.0/64.0"; "-" if one is None."""
    if used is None or total is None:
        return "-"
    return f"{used / GIB:.1f}/{total / GIB:.1f}"
