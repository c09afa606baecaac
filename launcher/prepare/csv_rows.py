"""Rows of a csv file, every cell the text that is written there."""

from __future__ import annotations

import csv
import itertools
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from launcher.prepare.rows import BadFile, Found, Place, Row
from launcher.prepare.text_files import text_lines

_QUOTES = 'a cell that has commas, quotes or line breaks is written in quotes, with quotes in it doubled: "say ""yes"""'


class CsvFile:
    """A csv file with a header. No cell is taken for a number or for missing, whatever it says."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def name(self) -> str:
        return str(self.path)

    def look(self) -> Found:
        count, columns = 0, ()  # type: int, tuple[str, ...]
        for count, (columns, _, _) in enumerate(self._records()):  # noqa: B007
            pass
        return Found(count, columns)

    def rows(self) -> Iterator[Row]:
        for number, (header, line, cells) in enumerate(self._records()):
            if number:
                yield Row(dict(zip(header, cells, strict=False)), Place(self.name, number, line))

    def _records(self) -> Iterator[tuple[tuple[str, ...], int, list[str]]]:
        """(header, first line, cells) of each record, that of the header itself included. Raises BadFile."""
        csv.field_size_limit(sys.maxsize)
        lines = text_lines(self.path)
        first = next(lines, "")
        lines = itertools.chain([first] if first else [], lines)
        if "\r" in first.rstrip("\r\n"):
            lines = _divided_at_returns(lines)
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
                        message = f"row {count} cannot be read: {len(cells)} cells, and the header has {len(header)}"
                        raise BadFile(self.name, message, _QUOTES, line)
                    yield header, line, cells
                line = reader.line_num + 1
        except csv.Error as error:
            message = f"row {count + 1} cannot be read: {error}"
            if "unexpected end" in str(error):
                message = f"row {count + 1} cannot be read: a quote that opens in it is never closed"
            raise BadFile(self.name, message, _QUOTES, line) from None

    def _header(self, cells: list[str]) -> tuple[str, ...]:
        header = tuple(cell.strip() for cell in cells)
        twice = sorted({name for name in header if name and header.count(name) > 1})
        if twice:
            raise BadFile(self.name, f"cannot be read: the header names {', '.join(twice)} more than once", line=1)
        return header

    def _delimiter(self, first: str) -> str:
        """A comma, but for .tsv and for a header that has no comma and is divided by semicolons or tabs."""
        if ".tsv" in self.path.suffixes:
            return "\t"
        return next((mark for mark in (";", "\t") if "," not in first and mark in first), ",")


def _divided_at_returns(lines: Iterable[str]) -> Iterator[str]:
    """The lines of a file from programs that end them with a carriage return alone."""
    for line in lines:
        yield from re.findall(r"[^\r]*\r\n?|[^\r]+", line)
