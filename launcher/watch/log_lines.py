"""Log lines of several nodes in time order, read in blocks from either end of the files."""

from __future__ import annotations

import heapq
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from itertools import islice
from typing import NamedTuple

from launcher.files import lines_backwards
from launcher.run_dir import utc_text
from launcher.watch.log_files import LogFile

_STAMP = re.compile(rb"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z(?: |$)")
STAMP_WIDTH = 24
_PROBE_BYTES = 64 * 1024
_MIN_BLOCK, _MAX_BLOCK, _ALL_BLOCKS = 16 * 1024, 1024 * 1024, 64 * 1024 * 1024


class Line(NamedTuple):
    """A log line. Tuples sort in display order.

    `time` is in seconds since the epoch by the supervisor's clock, `file_index` and `number` are its file and its
    position there, `stamp` is its time as text. A line without a time has the time of the line before it (0 before the
    first time) and an empty `stamp`. Within a file `time` never decreases: the order of the file stays even if its
    node's clock was set back.
    """

    time: float
    file_index: int
    number: int
    stamp: str
    text: str


Wanted = Callable[[Line], bool]
"""Whether a line is selected."""


class LineParser:
    """Parses the raw lines of one file, in order."""

    def __init__(self, log_file: LogFile, index: int) -> None:
        self._offset, self._index = log_file.offset_seconds, index
        self._time, self._number = 0.0, 0

    def parse(self, raw: bytes) -> Line:
        time, stamp, text = split_stamp(raw, self._offset)
        if time is not None and time > self._time:
            self._time = time
        self._number += 1
        return Line(self._time, self._index, self._number, stamp, text)


def split_stamp(raw: bytes, offset_seconds: float = 0.0) -> tuple[float | None, str, str]:
    """(seconds since the epoch, time as text, text) of a raw line, by the supervisor's clock."""
    if not _STAMP.match(raw):
        return None, "", raw.decode(errors="replace")
    stamp, text = raw[:STAMP_WIDTH].decode(), raw[STAMP_WIDTH + 1 :].decode(errors="replace")
    try:
        time = datetime.fromisoformat(stamp).timestamp() - offset_seconds
        return time, utc_text(time) if offset_seconds else stamp, text
    except (ValueError, OverflowError, OSError):  # not a date, or one beyond the years 1 to 9999
        return None, "", raw.decode(errors="replace")


def merged(
    log_files: Sequence[LogFile],
    *,
    since: float | None = None,
    last: int | None = None,
    wanted: Wanted = lambda _: True,
    ends: Sequence[int | None] | None = None,
) -> Iterator[Line]:
    """The wanted lines of all files in time order: those at or after `since`, and of those the `last` ones.

    `ends` are the positions in bytes at which to stop in each file. `last` reads only the ends of the files, `since`
    only the part after it.
    """
    ends = ends or [None] * len(log_files)

    def selected(line: Line) -> bool:
        return (since is None or line.time >= since) and wanted(line)

    if last is not None:
        tails = [_tail(*one, since, last, selected) for one in zip(log_files, range(len(log_files)), ends, strict=True)]
        return iter(deque(heapq.merge(*tails), maxlen=last))
    block = min(_MAX_BLOCK, max(_MIN_BLOCK, _ALL_BLOCKS // max(1, len(log_files))))
    files = [_forward(*one, since, block) for one in zip(log_files, range(len(log_files)), ends, strict=True)]
    return filter(selected, heapq.merge(*files))


def _forward(log_file: LogFile, index: int, end: int | None, since: float | None, block: int) -> Iterator[Line]:
    parser = LineParser(log_file, index)
    return map(parser.parse, _raw_lines(log_file, _start(log_file, since), end, block))


def _raw_lines(log_file: LogFile, start: int, end: int | None, block: int) -> Iterator[bytes]:
    """The lines after `start`, also a last one without a newline. Files are not kept open: there may be thousands."""
    position, rest, skip = start, b"", start > 0
    while True:
        size = block if end is None else min(block, max(0, end - position))
        with log_file.path.open("rb") as file:
            file.seek(position)
            data = file.read(size)
        if not data:
            break
        position += len(data)
        *lines, rest = (rest + data).split(b"\n")
        if skip and lines:
            lines, skip = lines[1:], False  # `start` was in the middle of this line
        yield from lines
    if rest and not skip:
        yield rest


def _start(log_file: LogFile, since: float | None) -> int:
    """A position in the file before the first line at or after `since`, found by doubling the distance to the end."""
    if since is None:
        return 0
    size, back = log_file.path.stat().st_size, _PROBE_BYTES
    while (position := size - back) > 0:
        time = _first_time(log_file, position)
        if time is not None and time < since:
            return position
        back *= 2
    return 0


def _first_time(log_file: LogFile, position: int) -> float | None:
    with log_file.path.open("rb") as file:
        file.seek(position)
        lines = file.read(_PROBE_BYTES).split(b"\n")[1:]
    times = (split_stamp(line, log_file.offset_seconds)[0] for line in lines)
    return next((time for time in times if time is not None), None)


def _tail(
    log_file: LogFile, index: int, end: int | None, since: float | None, count: int, selected: Wanted
) -> Iterable[Line]:
    """The last selected lines of one file, in order."""
    found = list(islice(filter(selected, _backward(log_file, index, end, since)), count))[::-1]
    time, lines = 0.0, []
    for number, line in enumerate(found):
        time = max(time, line.time)
        lines.append(line._replace(time=time, number=number))
    return lines


def _backward(log_file: LogFile, index: int, end: int | None, since: float | None) -> Iterator[Line]:
    """The lines from the last to the first, down to the first at or after `since`."""
    without_time: list[str] = []
    for raw in lines_backwards(log_file.path, end):
        time, stamp, text = split_stamp(raw, log_file.offset_seconds)
        if time is None:
            without_time.append(text)
            continue
        if since is not None and time < since:
            return
        yield from (Line(time, index, 0, "", text) for text in without_time)
        without_time.clear()
        yield Line(time, index, 0, stamp, text)
    yield from (Line(0.0, index, 0, "", text) for text in without_time)
