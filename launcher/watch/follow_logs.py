"""Follows the log files of a live run."""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from launcher.files import lines_backwards
from launcher.watch.log_files import LogFile
from launcher.watch.log_lines import Line, LineParser

REORDER_SECONDS = 0.5
"""How long a line is held back for earlier lines of other files."""
_MIN_WAIT, _MAX_WAIT, _WAIT_GROWTH = 0.1, 1.0, 1.3
_NEW_FILES_SECONDS = 2.0
_READ_BYTES = 1024 * 1024


class Clock(Protocol):
    """What a follower needs of `time`; a test replaces it."""

    def monotonic(self) -> float: ...

    def sleep(self, seconds: float, /) -> None: ...


@dataclass
class _Followed:
    log_file: LogFile
    parser: LineParser
    position: int
    rest: bytes = b""


class Follower:
    """The new lines of a run's log files, in time order.

    Every pass reads the files that have grown; passes are less frequent while no file grows. A line is held back for
    REORDER_SECONDS, so that earlier lines of slower files come before it.
    """

    def __init__(self, find: Callable[[], list[LogFile]], clock: Clock = time) -> None:
        """`find` returns the existing files; their present content is skipped."""
        self._find, self._clock = find, clock
        self._files: list[_Followed] = []
        self._known: set[str] = set()
        self._held: list[Line] = []
        self._batches: deque[tuple[float, Line]] = deque()
        self._searched = clock.monotonic()
        self._grew = self._searched
        for log_file in find():
            self._add(log_file, _end_of_last_line(log_file))

    @property
    def log_files(self) -> list[LogFile]:
        """The files that are followed; a line's `file_index` is an index into this list."""
        return [file.log_file for file in self._files]

    @property
    def ends(self) -> Sequence[int]:
        """The read position in each file, in bytes."""
        return [file.position for file in self._files]

    @property
    def quiet_seconds(self) -> float:
        """Seconds since a file last grew."""
        return self._clock.monotonic() - self._grew

    def batches(self, ended: Callable[[], bool]) -> Iterator[list[Line]]:
        """New lines, until `ended` returns True. May yield empty lists."""
        wait = _MIN_WAIT
        while not ended():
            wait = _MIN_WAIT if self._read_new() else min(_MAX_WAIT, wait * _WAIT_GROWTH)
            yield self._due()
            now = self._clock.monotonic()
            due = self._batches[0][0] + REORDER_SECONDS - now if self._batches else wait
            self._clock.sleep(max(0.01, min(wait, due)))
        self._read_new()
        yield self._rest()

    def _add(self, log_file: LogFile, position: int) -> None:
        self._known.add(str(log_file.path))
        self._files.append(_Followed(log_file, LineParser(log_file, len(self._files)), position))

    def _read_new(self) -> bool:
        """Reads the new lines of all files; returns whether there are any."""
        now = self._clock.monotonic()
        if now - self._searched >= _NEW_FILES_SECONDS or not self._files:
            self._searched = now
            for log_file in self._find():
                if str(log_file.path) not in self._known:
                    self._add(log_file, 0)
        lines = [line for file in self._files for line in _new_lines(file)]
        if not lines:
            return False
        for line in lines:
            heapq.heappush(self._held, line)
        self._batches.append((now, max(lines)))
        self._grew = now
        return True

    def _due(self) -> list[Line]:
        """The lines that were held back long enough, and all earlier ones."""
        now = self._clock.monotonic()
        newest: Line | None = None
        while self._batches and self._batches[0][0] + REORDER_SECONDS <= now:
            _, line = self._batches.popleft()
            newest = line if newest is None else max(newest, line)
        lines: list[Line] = []
        while newest is not None and self._held and self._held[0] <= newest:
            lines.append(heapq.heappop(self._held))
        return lines

    def _rest(self) -> list[Line]:
        """All lines that are held back, and last lines without a newline."""
        torn = [file.parser.parse(file.rest) for file in self._files if file.rest]
        lines = sorted([*self._held, *torn])
        self._held, self._batches = [], deque()
        return lines


def _end_of_last_line(log_file: LogFile) -> int:
    """The position in bytes after a file's last complete line."""
    size = log_file.path.stat().st_size
    torn = next(lines_backwards(log_file.path, size), b"")
    with log_file.path.open("rb") as file:
        file.seek(max(0, size - 1))
        whole = file.read(1) == b"\n" or size == 0
    return size if whole else size - len(torn)


def _new_lines(file: _Followed) -> list[Line]:
    try:
        size = file.log_file.path.stat().st_size
    except FileNotFoundError:
        return []
    if size <= file.position:
        return []
    with file.log_file.path.open("rb") as opened:
        opened.seek(file.position)
        data = opened.read(_READ_BYTES)
    file.position += len(data)
    *lines, file.rest = (file.rest + data).split(b"\n")
    return [file.parser.parse(line) for line in lines]
