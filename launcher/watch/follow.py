"""Following the log files of a live run."""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from launcher.tail import lines_backwards
from launcher.watch.lines import Line, Reader
from launcher.watch.sources import Source

HOLD_SECONDS = 0.5
"""How long a line waits for earlier ones of other files."""
_SHORTEST, _LONGEST, _SLOWER = 0.1, 1.0, 1.3
_LOOK_SECONDS = 2.0
_READ_BYTES = 1024 * 1024


class Clock(Protocol):
    """The time that passes, and waiting."""

    def monotonic(self) -> float: ...

    def sleep(self, seconds: float, /) -> None: ...


@dataclass
class _Followed:
    source: Source
    reader: Reader
    position: int
    rest: bytes = b""


class Follower:
    """The lines that a run's files gain, in the order of time.

    Every pass asks each file for its size and reads those that grew; passes come less often while nothing does. A line
    is held for HOLD_SECONDS, so that earlier lines of slower files come before it.
    """

    def __init__(self, find: Callable[[], list[Source]], clock: Clock = time) -> None:
        """`find` names the files that there are; what they hold so far is left out."""
        self._find, self._clock = find, clock
        self._files: list[_Followed] = []
        self._known: set[str] = set()
        self._held: list[Line] = []
        self._batches: deque[tuple[float, Line]] = deque()
        self._looked = clock.monotonic()
        self._grew = self._looked
        for source in find():
            self._add(source, _end_of_lines(source))

    @property
    def sources(self) -> list[Source]:
        """The files that are followed; a line's `source` is its place here."""
        return [file.source for file in self._files]

    @property
    def ends(self) -> Sequence[int]:
        """How far each file counts as read."""
        return [file.position for file in self._files]

    @property
    def quiet_seconds(self) -> float:
        """For how long no file has grown."""
        return self._clock.monotonic() - self._grew

    def batches(self, ended: Callable[[], bool]) -> Iterator[list[Line]]:
        """Lines as they fall due, until `ended` says that no more will come. May yield empty lists."""
        wait = _SHORTEST
        while not ended():
            wait = _SHORTEST if self._pass() else min(_LONGEST, wait * _SLOWER)
            yield self._due()
            now = self._clock.monotonic()
            due = self._batches[0][0] + HOLD_SECONDS - now if self._batches else wait
            self._clock.sleep(max(0.01, min(wait, due)))
        self._pass()
        yield self._rest()

    def _add(self, source: Source, position: int) -> None:
        self._known.add(str(source.path))
        self._files.append(_Followed(source, Reader(source, len(self._files)), position))

    def _pass(self) -> bool:
        """Takes in what the files have gained; whether one has."""
        now = self._clock.monotonic()
        if now - self._looked >= _LOOK_SECONDS or not self._files:
            self._looked = now
            for source in self._find():
                if str(source.path) not in self._known:
                    self._add(source, 0)
        lines = [line for file in self._files for line in _gained(file)]
        if not lines:
            return False
        for line in lines:
            heapq.heappush(self._held, line)
        self._batches.append((now, max(lines)))
        self._grew = now
        return True

    def _due(self) -> list[Line]:
        """What has waited long enough, with everything before it."""
        now = self._clock.monotonic()
        newest: Line | None = None
        while self._batches and self._batches[0][0] + HOLD_SECONDS <= now:
            _, line = self._batches.popleft()
            newest = line if newest is None else max(newest, line)
        lines: list[Line] = []
        while newest is not None and self._held and self._held[0] <= newest:
            lines.append(heapq.heappop(self._held))
        return lines

    def _rest(self) -> list[Line]:
        """Everything that is held, and the last lines that never got an end."""
        torn = [file.reader.read(file.rest) for file in self._files if file.rest]
        lines = sorted([*self._held, *torn])
        self._held, self._batches = [], deque()
        return lines


def _end_of_lines(source: Source) -> int:
    """Where the last whole line of a file ends."""
    size = source.path.stat().st_size
    torn = next(lines_backwards(source.path, size), b"")
    with source.path.open("rb") as file:
        file.seek(max(0, size - 1))
        whole = file.read(1) == b"\n" or size == 0
    return size if whole else size - len(torn)


def _gained(file: _Followed) -> list[Line]:
    try:
        size = file.source.path.stat().st_size
    except FileNotFoundError:
        return []
    if size <= file.position:
        return []
    with file.source.path.open("rb") as opened:
        opened.seek(file.position)
        data = opened.read(_READ_BYTES)
    file.position += len(data)
    *lines, file.rest = (file.rest + data).split(b"\n")
    return [file.reader.read(line) for line in lines]
