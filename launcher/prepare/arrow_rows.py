"""Rows of parquet files and Arrow tables as Python values. Imports pyarrow on first use."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from launcher.errors import first_line
from launcher.prepare.rows import CONTENT_COLUMNS, BadFile, FileSummary, Row, RowLocation

Convert = Callable[[Any], Any]
_BATCH = 256
_TEXTS = ("content", "value", "text", "prompt", "completion", "instruction", "input", "output", "system")


class ParquetFile:
    """A parquet file. Reads only the content columns, in batches."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def name(self) -> str:
        return str(self.path)

    def summary(self) -> FileSummary:
        file = self._open()
        return table_summary(self.name, file.metadata.num_rows, file.schema_arrow)

    def rows(self) -> Iterator[Row]:
        file = self._open()
        columns = content_columns(file.schema_arrow.names)
        if not columns:
            yield from empty_rows(self.name, file.metadata.num_rows)
            return
        try:
            yield from table_rows(self.name, file.iter_batches(_BATCH, columns=columns), file.schema_arrow)
        except Exception as error:  # Arrow raises many types
            raise self._bad(error) from None

    def _open(self) -> Any:
        import pyarrow.parquet

        try:
            return pyarrow.parquet.ParquetFile(self.path)
        except Exception as error:
            raise self._bad(error) from None

    def _bad(self, error: Exception) -> BadFile:
        if isinstance(error, BadFile):
            return error
        return BadFile(self.name, f"cannot be read: {first_line(error)}", "is it a complete parquet file?")


def table_summary(name: str, rows: int, schema: Any) -> FileSummary:
    """The summary of a table, with a note on each column whose texts datasets may have altered.

    Raises BadFile if two content columns have the same name.
    """
    duplicates = sorted({column for column in content_columns(schema.names) if schema.names.count(column) > 1})
    if duplicates:
        raise BadFile(name, f"cannot be read: it has more than one column {', '.join(duplicates)}")
    notes = []
    for field in schema:
        if field.name in CONTENT_COLUMNS and _converter(field.type, field.name) is not None:
            notes.append(
                f"{name} stores {field.name} as datasets' Json type, in which text that is JSON looks like an "
                f"object: texts are read as they are stored, without surrounding quotes"
            )
    return FileSummary(rows, tuple(schema.names), tuple(notes))


def table_rows(name: str, batches: Iterable[Any], schema: Any) -> Iterator[Row]:
    """The rows of an Arrow table's batches, with values of datasets' Json type decoded."""
    converts = {field.name: _converter(field.type, field.name) for field in schema if field.name in CONTENT_COLUMNS}
    number = 0
    for batch in batches:
        for values in batch.to_pylist():
            number += 1
            for column, convert in converts.items():
                if convert is not None:
                    values[column] = convert(values[column])
            yield Row(values, RowLocation(name, number))


def empty_rows(name: str, count: int) -> Iterator[Row]:
    """Empty rows, for a table without content columns."""
    return (Row({}, RowLocation(name, number)) for number in range(1, count + 1))


def content_columns(names: Iterable[str]) -> list[str]:
    """The columns in `names` that are read."""
    return [name for name in names if name in CONTENT_COLUMNS]


def _children(kind: Any) -> list[tuple[str, Any]]:
    """The (name, type) of a struct's fields or a list's values; the name of a list's values is ""."""
    import pyarrow

    if pyarrow.types.is_struct(kind):
        return [(field.name, field.type) for field in kind]
    if hasattr(kind, "value_type") and not pyarrow.types.is_dictionary(kind):
        return [("", kind.value_type)]
    return []


def _converter(kind: Any, name: str) -> Convert | None:
    """A function that decodes the values of datasets' Json type in a column; None if the column has none."""
    import pyarrow

    if isinstance(kind, pyarrow.JsonType):
        return _text_or_json if name in _TEXTS else _from_json
    if pyarrow.types.is_struct(kind):
        inner = {child: _converter(child_kind, child) for child, child_kind in _children(kind)}
        changed = {child: convert for child, convert in inner.items() if convert is not None}
        return _of_struct(changed) if changed else None
    convert = next((_converter(child, child_name) for child_name, child in _children(kind)), None)
    return _of_list(convert) if convert is not None else None


def _of_struct(converts: dict[str, Convert]) -> Convert:
    def convert(value: Any) -> Any:
        return value and {name: converts[name](one) if name in converts else one for name, one in value.items()}

    return convert


def _of_list(convert_one: Convert) -> Convert:
    return lambda value: value and [convert_one(one) for one in value]


def _from_json(value: Any) -> Any:
    return None if value is None else json.loads(value)


def _text_or_json(value: Any) -> Any:
    """Decodes quoted text and lists of objects (messages, content parts); everything else stays text."""
    decoded = _from_json(value)
    if isinstance(decoded, str) or (isinstance(decoded, list) and all(isinstance(one, dict) for one in decoded)):
        return decoded
    return value
