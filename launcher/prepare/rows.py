"""Rows of a data set with the place of each, and what a reader of one file is. Nothing heavy is imported."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from launcher.errors import Problem

MEANINGFUL = (
    *("messages", "conversations", "prompt", "completion", "instruction", "input", "output", "text"),
    *("system", "history", "tools", "chat_template_kwargs"),
)
"""The columns that say something about what is learned. No other column of a parquet file or a hub set is read."""


class Place(NamedTuple):
    """Where a row is: a file or a hub name, the number of the row in it from 1, and the line that it begins on."""

    source: str
    row: int
    line: int | None = None

    def problem(self, message: str, key: str, hint: str | None = None) -> Problem:
        """A problem with this row."""
        return Problem(f"row {self.row}: {message}", file=self.source, line=self.line, key=key, hint=hint)

    def __str__(self) -> str:
        return f"row {self.row} of {self.source}"


class Row(dict[str, Any]):
    """A row by column name, and its place."""

    __slots__ = ("place",)

    def __init__(self, values: dict[str, Any], place: Place) -> None:
        super().__init__(values)
        self.place = place


class BadFile(ValueError):
    """A file that cannot be read, or a place in it."""

    def __init__(self, file: str, message: str, hint: str | None = None, line: int | None = None) -> None:
        super().__init__(message)
        self.file, self.message, self.hint, self.line = file, message, hint, line

    def problem(self, key: str) -> Problem:
        """As a problem with the job's `key`."""
        return Problem(self.message, file=self.file, line=self.line, key=key, hint=self.hint)


@dataclass(frozen=True)
class Found:
    """What a first look at a file found."""

    rows: int
    columns: tuple[str, ...]
    notes: tuple[str, ...] = ()


class RowReader(Protocol):
    """One file, or one split of a stored data set."""

    @property
    def name(self) -> str:
        """The file's path or the set's name, for messages."""

    def look(self) -> Found:
        """Rows and columns, without keeping any row. Raises BadFile."""

    def rows(self) -> Iterator[Row]:
        """The rows in order. Raises BadFile."""
