"""Log lines of several nodes in the order of time, read in blocks from either end."""

from __future__ import annotations

import heapq
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from itertools import islice
from typing import NamedTuple

from launcher.run_dir import utc_text
from launcher.tail import lines_backwards
from launcher.watch.sources import Source

_STAMP = re.compile(rb"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z(?: |$)")
STAMP_WIDTH = 24
_PROBE_BYTES = 64 * 1024
_LEAST_BLOCK, _MOST_BLOCK, _ALL_BLOCKS = 16 * 1024, 1024 * 1024, 64 * 1024 * 1024


class Line(NamedTuple):
    """A line: seconds since the epoch by the supervisor's clock, its file, its place there, its time, its text.

    Tuples sort as they are to be shown. A line without a time of its own has that of the line before it, and an empty
    `stamp`; before the first time there is none, and `time` is 0. Within a file time never goes back, so that the
    file's order stays even where a clock was set.
    """

    time: float
    source: int
    number: int
    stamp: str
    text: str


Wanted = Callable[[Line], bool]


class Reader:
    """Turns the raw lines of one file, in their order, into lines."""

    def __init__(self, source: Source, index: int) -> None:
        self._offset, self._index = source.offset_seconds, index
        self._time, self._number = 0.0, 0

    def read(self, raw: bytes) -> Line:
        time, stamp, text = split_stamp(raw, self._offset)
        if time is not None and time > self._time:
            self._time = time
        self._number += 1
        return Line(self._time, self._index, self._number, stamp, text)


def split_stamp(raw: bytes, offset_seconds: float = 0.0) -> tuple[float | None, str, str]:
    """(seconds since the epoch, the time as text, the text) of a raw line, by the supervisor's clock."""
    if not _STAMP.match(raw):
        return None, "", raw.decode(errors="replace")
    stamp, text = raw[:STAMP_WIDTH].decode(), raw[STAMP_WIDTH + 1 :].decode(errors="replace")
    try:
        time = datetime.fromisoformat(stamp).timestamp() - offset_seconds
    except ValueError:
        return None, "", raw.decode(errors="replace")
    return time, utc_text(time) if offset_seconds else stamp, text


def merged(
    sources: Sequence[Source],
    *,
    since: float | None = None,
    last: int | None = None,
    wanted: Wanted = lambda _: True,
    ends: Sequence[int | None] | None = None,
) -> Iterator[Line]:
    """The lines of all files in the order of time: those from `since` on, the `last` of those.

    `ends` says where to stop in each file, in bytes. For `last` only the ends of the files are read, for `since` what
    lies after it.
    """
    ends = ends or [None] * len(sources)

    def asked(line: Line) -> bool:
        return (since is None or line.time >= since) and wanted(line)

    if last is not None:
        tails = [_tail(*one, since, last, asked) for one in zip(sources, range(len(sources)), ends, strict=True)]
        return iter(deque(heapq.merge(*tails), maxlen=last))
    block = min(_MOST_BLOCK, max(_LEAST_BLOCK, _ALL_BLOCKS // max(1, len(sources))))
    files = [_forward(*one, since, block) for one in zip(sources, range(len(sources)), ends, strict=True)]
    return filter(asked, heapq.merge(*files))


def _forward(source: Source, index: int, end: int | None, since: float | None, block: int) -> Iterator[Line]:
    reader = Reader(source, index)
    return map(reader.read, _raw_lines(source, _start(source, since), end, block))


def _raw_lines(source: Source, start: int, end: int | None, block: int) -> Iterator[bytes]:
    """Whole lines from `start` on, and a last one without its end. No file is held open: there may be thousands."""
    position, rest, skip = start, b"", start > 0
    while True:
        size = block if end is None else min(block, max(0, end - position))
        with source.path.open("rb") as file:
            file.seek(position)
            data = file.read(size)
        if not data:
            break
        position += len(data)
        *lines, rest = (rest + data).split(b"\n")
        if skip and lines:
            lines, skip = lines[1:], False  # it began in the middle of this line
        yield from lines
    if rest and not skip:
        yield rest


def _start(source: Source, since: float | None) -> int:
    """A place in the file before the lines from `since` on, found by looking ever further back."""
    if since is None:
        return 0
    size, back = source.path.stat().st_size, _PROBE_BYTES
    while (position := size - back) > 0:
        time = _first_time(source, position)
        if time is not None and time < since:
            return position
        back *= 2
    return 0


def _first_time(source: Source, position: int) -> float | None:
    with source.path.open("rb") as file:
        file.seek(position)
        lines = file.read(_PROBE_BYTES).split(b"\n")[1:]
    times = (split_stamp(line, source.offset_seconds)[0] for line in lines)
    return next((time for time in times if time is not None), None)


def _tail(
    source: Source, index: int, end: int | None, since: float | None, count: int, asked: Wanted
) -> Iterable[Line]:
    """The last lines asked for of one file, in their order."""
    found = list(islice(filter(asked, _backward(source, index, end, since)), count))[::-1]
    time, lines = 0.0, []
    for number, line in enumerate(found):
        time = max(time, line.time)
        lines.append(line._replace(time=time, number=number))
    return lines


def _backward(source: Source, index: int, end: int | None, since: float | None) -> Iterator[Line]:
    """The lines from the last to the first, until they are older than `since`."""
    untimed: list[str] = []
    for raw in lines_backwards(source.path, end):
        time, stamp, text = split_stamp(raw, source.offset_seconds)
        if time is None:
            untimed.append(text)
            continue
        if since is not None and time < since:
            return
        yield from (Line(time, index, 0, "", text) for text in untimed)
        untimed.clear()
        yield Line(time, index, 0, stamp, text)
    yield from (Line(0.0, index, 0, "", text) for text in untimed)
