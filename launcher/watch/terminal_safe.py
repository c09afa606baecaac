"""Removes terminal control sequences from log text."""

from __future__ import annotations

import re

_SEQUENCE = (
    r"\x1b\[[0-?]*[ -/]*[@-~]"  # CSI: cursor, erasing, colours
    r"|\x1b[\]P^_X][^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)?"  # OSC and other strings: titles, clipboards, links
    r"|\x9b[0-?]*[ -/]*[@-~]"
    r"|\x1b[ -/]*[0-~]?"
)
# Half of a surrogate pair cannot be written to the terminal: Python raises an error.
_CONTROL = r"[\x00-\x08\x0a-\x1f\x7f-\x9f\ud800-\udfff]"
_ALL = re.compile(f"{_SEQUENCE}|{_CONTROL}")
_COLOUR = re.compile(r"\x1b\[[0-9;:]*m")
RESET = "\x1b[0m"


def plain(text: str) -> str:
    """One line without control sequences and control characters, except tabs."""
    return _ALL.sub("", text)


def coloured(text: str) -> str:
    """One line without control sequences except colours, which are reset at its end."""
    if "\x1b" not in text:
        return plain(text)
    kept = _ALL.sub(lambda found: found[0] if _COLOUR.fullmatch(found[0]) else "", text)
    return kept + RESET if "\x1b" in kept else kept
