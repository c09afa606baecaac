"""Parts of a data set: the units in which it is tokenised, each on its own, in any process.

Where a part begins depends only on the data. A file with a JSON object on each line is cut by bytes, and every process
reads its parts itself. Other files are read by one process, which packs the rows for the others.
"""

from __future__ import annotations

import codecs
import json
import pickle
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from launcher.prepare.json_rows import JsonText, json_row
from launcher.prepare.rows import BadFile, Row, RowLocation
from launcher.prepare.text_files import not_utf8

PART_BYTES = 1 << 20
_PART_ROWS = 512
_LONGEST_FIRST_LINE = 1 << 24
_AFTER_NEWLINE = (b"\n\n", b"\n\r", b"\n ", b"\n\t")


class NotLines(Exception):
    """A file does not have one row on each line, although its first line is one."""


@dataclass(frozen=True)
class LinePart:
    """The bytes `start` to `stop` of a file with a JSON object on each line.

    `row` and `line` are the numbers of its first row, from 1. `count`: its rows; `chosen` marks the wanted ones (None:
    all).
    """

    path: Path
    start: int
    stop: int
    row: int
    line: int
    count: int
    chosen: npt.NDArray[np.bool_] | None = None

    def rows(self) -> Iterator[Row]:
        """The wanted rows. Raises BadFile, and NotLines if the rows are not one on each line."""
        text = JsonText(self.path, iter([self._text()]), self.line, self.row)
        number = 0
        while text.peek():
            if number == self.count:
                raise NotLines
            if self.chosen is not None and not self.chosen[number]:
                text.skip_line()
            else:
                yield json_row(text, self.row + number, *text.value())
            number += 1
        if number != self.count:
            raise NotLines

    def _text(self) -> str:
        try:
            with self.path.open("rb") as file:
                file.seek(self.start)
                content = file.read(self.stop - self.start)
        except OSError as error:
            raise BadFile(str(self.path), f"cannot be read: {error.strerror}") from None
        try:
            return content.decode()
        except UnicodeDecodeError as error:
            raise not_utf8(self.path, self.line + content.count(b"\n", 0, error.start), error) from None


@dataclass(frozen=True)
class PackedPart:
    """Rows that one process has read, packed for another."""

    packed: tuple[bytes, ...]

    def rows(self) -> Iterator[Row]:
        """The rows."""
        for one in self.packed:
            values, location = pickle.loads(one)
            yield Row(values, RowLocation(*location))


Part = LinePart | PackedPart


def packed_parts(rows: Iterable[Row]) -> Iterator[PackedPart]:
    """The rows in parts of about PART_BYTES, and at most 512 rows."""
    packed: list[bytes] = []
    size = 0
    for row in rows:
        packed.append(pickle.dumps((dict(row), tuple(row.location)), protocol=5))
        size += len(packed[-1])
        if size >= PART_BYTES or len(packed) == _PART_ROWS:
            yield PackedPart(tuple(packed))
            packed, size = [], 0
    if packed:
        yield PackedPart(tuple(packed))


def parts_of_lines(files: Sequence[Path]) -> list[LinePart] | None:
    """The parts of files that all have a JSON object on each line; None if one has not, or if they are small."""
    parts: list[LinePart] = []
    try:
        if sum(file.stat().st_size for file in files) <= 2 * PART_BYTES:
            return None
        for file in files:
            found = line_parts(file)
            if found is None:
                return None
            parts += found
        for _ in parts[0].rows():
            pass
    except (OSError, BadFile, NotLines):
        return None
    return parts


def line_parts(path: Path) -> list[LinePart] | None:
    """The parts of a file that has a JSON object on each line; None if its first line is not one, or the only one.

    Reads the file once, to count its lines. Raises OSError.
    """
    with path.open("rb") as file:
        if not _is_object(file.readline(_LONGEST_FIRST_LINE)):
            return None
        file.seek(0)
        parts: list[LinePart] = []
        start, row, line = 0, 1, 1
        while block := file.read(PART_BYTES):
            block += file.readline()
            count = _filled_lines(block)
            parts.append(LinePart(path, start, start + len(block), row, line, count))
            start, row, line = start + len(block), row + count, line + block.count(b"\n")
    return parts if row > 2 else None


def _is_object(line: bytes) -> bool:
    """Whether the line is a JSON object."""
    try:
        return isinstance(json.loads(line.removeprefix(codecs.BOM_UTF8)), dict)
    except (ValueError, RecursionError):
        return False


def _filled_lines(block: bytes) -> int:
    """The number of lines that are not blank."""
    if block[:1].isspace() or any(blank in block for blank in _AFTER_NEWLINE):
        return sum(1 for line in block.split(b"\n") if line.strip())
    return block.count(b"\n") + (not block.endswith(b"\n"))
