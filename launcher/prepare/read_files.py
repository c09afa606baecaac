"""Readers of files, by file kind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from launcher.prepare.arrow_rows import ParquetFile
from launcher.prepare.csv_rows import CsvFile
from launcher.prepare.json_rows import JsonFile
from launcher.prepare.rows import FileSummary, Row, RowLocation, RowReader
from launcher.prepare.text_files import text_chunks


class TextFile:
    """A text file: one document, with its line ends unchanged."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def name(self) -> str:
        return str(self.path)

    def summary(self) -> FileSummary:
        for _ in text_chunks(self.path):
            pass
        return FileSummary(1, ("text",))

    def rows(self) -> Iterator[Row]:
        yield Row({"text": "".join(text_chunks(self.path))}, RowLocation(self.name, 1))


def file_reader(path: Path, builder: str) -> RowReader:
    """The reader of a file of the kind `builder`, a value of `sources.BUILDERS`."""
    kinds: dict[str, type[JsonFile | CsvFile | ParquetFile | TextFile]] = {
        "json": JsonFile,
        "csv": CsvFile,
        "parquet": ParquetFile,
        "text": TextFile,
    }
    return kinds[builder](path)
