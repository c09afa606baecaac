"""Samples a long metrics.jsonl without reading all of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from launcher.watch.run_session import Record, parsed

POINTS = 200
_WHOLE_BYTES = 128 * 1024
_LINE_BYTES = 4 * 1024


def sampled(path: Path, points: int = POINTS) -> list[Record]:
    """Lines spread evenly over a file of JSON lines, with its first and last complete ones; all lines of a short file.

    Lines in between are skipped, not averaged.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return []
    with file:
        size = file.seek(0, os.SEEK_END)
        if size <= _WHOLE_BYTES:
            file.seek(0)
            return list(parsed(file.read().splitlines()))
        return list(_spread(file.fileno(), size, points))


def _spread(file: int, size: int, points: int) -> Iterator[Record]:
    """One line at each point, none twice."""
    end = -1
    for point in range(points):
        position = point * (size - _LINE_BYTES) // (points - 1)
        if position <= end:
            continue
        data = os.pread(file, _LINE_BYTES, position)
        start = 0 if position == 0 else data.find(b"\n") + 1
        lines = data[start:].split(b"\n")[:-1]
        # At the last point, the file's last line is chosen.
        chosen = lines[-1:] if point == points - 1 else lines[:1]
        yield from parsed(chosen)
        end = position + start + len(chosen[0]) if chosen else end
