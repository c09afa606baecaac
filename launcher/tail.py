"""Following files that grow by lines."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from launcher.files import parse_lines

_STAMP = re.compile(r"^\d{4}-\d\d-\d\dT\S+Z ?")


class Tail:
    """The JSON lines that a file has gained since the last look."""

    def __init__(self, path: Path) -> None:
        self._path, self._position = path, 0

    def skip(self) -> None:
        """Leaves out what the file has so far."""
        self._position = self._path.stat().st_size if self._path.exists() else 0

    def new(self) -> list[dict[str, Any]]:
        """Whole new lines; a half-written one is left for the next look, a missing file has none.

        Lines that a full disk or a lost node left damaged are skipped.
        """
        try:
            with self._path.open("rb") as file:
                file.seek(self._position)
                data = file.read()
        except FileNotFoundError:
            return []
        end = data.rfind(b"\n") + 1
        self._position += end
        return list(parse_lines(data[:end].split(b"\n")))


def last_lines(path: Path, count: int, most_bytes: int = 64 * 1024) -> list[str]:
    """The last `count` lines within the last `most_bytes` of a text file; none where it is missing."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - most_bytes))
            lines = file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    return lines[-count:]


def strip_times(lines: Iterable[str]) -> list[str]:
    """Log lines without their times."""
    return [_STAMP.sub("", line) for line in lines]


def lines_backwards(path: Path, end: int | None = None, block_bytes: int = 64 * 1024) -> Iterator[bytes]:
    """The lines of a file from the last to the first, without their ends; only what is asked for is read.

    `end` is where to begin in bytes, the file's end where it is None. A missing file has no lines.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        position = file.seek(0, os.SEEK_END) if end is None else end
        rest, last = b"", True
        while position > 0:
            start = max(0, position - block_bytes)
            file.seek(start)
            rest, *lines = (file.read(position - start) + rest).split(b"\n")
            position = start
            if last and lines:
                # A newline ends the last line, and no empty one follows it.
                lines, last = lines if lines[-1] else lines[:-1], False
            yield from reversed(lines)
        if rest or not last:
            yield rest
