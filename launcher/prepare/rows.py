"""Rows of a data set with their locations, and the interface of a reader. No heavy imports."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from launcher.errors import Problem

CONTENT_COLUMNS = (
    *("messages", "conversations", "prompt", "completion", "instruction", "input", "output", "text"),
    *("system", "history", "tools", "chat_template_kwargs"),
)
"""The columns with training content. Readers of parquet files and hub data sets skip all other columns."""


class RowLocation(NamedTuple):
    """The location of a row: a file or a hub name, the row number from 1, and the row's first line."""

    source: str
    row: int
    line: int | None = None

    def problem(self, message: str, key: str, hint: str | None = None) -> Problem:
        """A problem with this row."""
        return Problem(f"row {self.row}: {message}", file=self.source, line=self.line, key=key, hint=hint)

    def __str__(self) -> str:
        return f"row {self.row} of {self.source}"


class Row(dict[str, Any]):
    """A row by column name, with its location."""

    __slots__ = ("location",)

    def __init__(self, values: dict[str, Any], location: RowLocation) -> None:
        super().__init__(values)
        self.location = location


class BadFile(ValueError):
    """A file that cannot be read, with the line if known."""

    def __init__(self, file: str, message: str, hint: str | None = None, line: int | None = None) -> None:
        super().__init__(message)
        self.file, self.message, self.hint, self.line = file, message, hint, line

    def problem(self, key: str) -> Problem:
        """The error as a problem of the job's `key`."""
        return Problem(self.message, file=self.file, line=self.line, key=key, hint=self.hint)


@dataclass(frozen=True)
class FileSummary:
    """Row count, columns and notes of a file."""

    rows: int
    columns: tuple[str, ...]
    notes: tuple[str, ...] = ()


class RowReader(Protocol):
    """One file, or one split of a stored data set."""

    @property
    def name(self) -> str:
        """The file path or the data set's name, for messages."""

    def summary(self) -> FileSummary:
        """Row count and columns, from one pass over the file. Raises BadFile."""

    def rows(self) -> Iterator[Row]:
        """The rows in order. Raises BadFile."""
