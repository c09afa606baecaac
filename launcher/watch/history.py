"""The whole of a long metrics.jsonl in a few points, without reading it whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from launcher.watch.session import Record, parsed

POINTS = 200
_WHOLE_BYTES = 128 * 1024
_LINE_BYTES = 4 * 1024


def sampled(path: Path, points: int = POINTS) -> list[Record]:
    """Lines spread evenly over a file of JSON lines, its first and its last whole ones among them; all of a short one.

    Lines are taken as they are: what lies between them is not averaged.
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
    """One line at each of the points, none twice."""
    past = -1
    for point in range(points):
        wanted = point * (size - _LINE_BYTES) // (points - 1)
        if wanted <= past:
            continue
        data = os.pread(file, _LINE_BYTES, wanted)
        begin = 0 if wanted == 0 else data.find(b"\n") + 1
        lines = data[begin:].split(b"\n")[:-1]
        # The last block is wanted for its last line.
        chosen = lines[-1:] if point == points - 1 else lines[:1]
        yield from parsed(chosen)
        past = wanted + begin + len(chosen[0]) if chosen else past
