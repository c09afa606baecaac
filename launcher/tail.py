"""Following files that grow by lines."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class Tail:
    """The JSON lines that a file has gained since the last look."""

    def __init__(self, path: Path) -> None:
        self._path, self._position = path, 0

    def skip(self) -> None:
        """Leaves out what the file has so far."""
        self._position = self._path.stat().st_size if self._path.exists() else 0

    def new(self) -> list[dict[str, Any]]:
        """Whole new lines; a half-written one is left for the next look, a missing file has none."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._position)
                data = file.read()
        except FileNotFoundError:
            return []
        end = data.rfind(b"\n") + 1
        self._position += end
        return [json.loads(line) for line in data[:end].splitlines()]


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
