"""Rows of a csv file. Every cell is text."""

from __future__ import annotations

import csv
import itertools
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from launcher.prepare.rows import BadFile, FileSummary, Row, RowLocation
from launcher.prepare.text_files import text_lines

_QUOTES = 'quote cells that contain commas, quotes or line breaks, and double the quotes in them: "say ""yes"""'


class CsvFile:
    """A csv file with a header. No cell is converted to a number or treated as missing."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def name(self) -> str:
        return str(self.path)

    def summary(self) -> FileSummary:
        count, columns = 0, ()  # type: int, tuple[str, ...]
        for count, (columns, _, _) in enumerate(self._records()):  # noqa: B007
            pass
        return FileSummary(count, columns)

    def rows(self) -> Iterator[Row]:
        for number, (header, line, cells) in enumerate(self._records()):
            if number:
                yield Row(dict(zip(header, cells, strict=False)), RowLocation(self.name, number, line))

    def _records(self) -> Iterator[tuple[tuple[str, ...], int, list[str]]]:
        """(header, first line, cells) of each record, including the header. Raises BadFile."""
        csv.field_size_limit(sys.maxsize)
        lines = text_lines(self.path)
        first = next(lines, "")
        lines = itertools.chain([first] if first else [], lines)
        if "\r" in first.rstrip("\r\n"):
            lines = _split_at_returns(lines)
        reader = csv.reader(lines, delimiter=self._delimiter(first.partition("\r")[0]), strict=True)
        header: tuple[str, ...] = ()
        line, count = 1, 0
        try:
            for cells in reader:
                if cells and not header:
                    header = self._header(cells)
                    yield header, line, cells
                elif cells:
                    count += 1
                    if len(cells) > len(header):
                        message = f"row {count} cannot be read: {len(cells)} cells, but the header has {len(header)}"
                        raise BadFile(self.name, message, _QUOTES, line)
                    yield header, line, cells
                line = reader.line_num + 1
        except csv.Error as error:
            message = f"row {count + 1} cannot be read: {error}"
            if "unexpected end" in str(error):
                message = f"row {count + 1} cannot be read: it has a quote that is never closed"
            raise BadFile(self.name, message, _QUOTES, line) from None

    def _header(self, cells: list[str]) -> tuple[str, ...]:
        header = tuple(cell.strip() for cell in cells)
        duplicates = sorted({name for name in header if name and header.count(name) > 1})
        if duplicates:
            raise BadFile(
                self.name, f"cannot be read: duplicate columns in the header: {', '.join(duplicates)}", line=1
            )
        return header

    def _delimiter(self, first: str) -> str:
        """A tab for .tsv; otherwise a comma, or a semicolon or tab if the header has no comma."""
        if ".tsv" in self.path.suffixes:
            return "\t"
        return next((one for one in (";", "\t") if "," not in first and one in first), ",")


def _split_at_returns(lines: Iterable[str]) -> Iterator[str]:
    """The lines of a file whose line ends are single carriage returns."""
    for line in lines:
        yield from re.findall(r"[^\r]*\r\n?|[^\r]+", line)
