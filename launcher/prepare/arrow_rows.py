"""Rows of parquet files and of Arrow tables, as plain Python values. pyarrow is imported when one is read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from launcher.errors import first_line
from launcher.prepare.rows import MEANINGFUL, BadFile, Found, Place, Row

Convert = Callable[[Any], Any]
_BATCH = 256
_TEXTS = ("content", "value", "text", "prompt", "completion", "instruction", "input", "output", "system")


class ParquetFile:
    """A parquet file, of which the columns that say something are read, a batch at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def name(self) -> str:
        return str(self.path)

    def look(self) -> Found:
        file = self._open()
        return look_at_table(self.name, file.metadata.num_rows, file.schema_arrow)

    def rows(self) -> Iterator[Row]:
        file = self._open()
        columns = meaningful(file.schema_arrow.names)
        if not columns:
            yield from empty_rows(self.name, file.metadata.num_rows)
            return
        try:
            yield from table_rows(self.name, file.iter_batches(_BATCH, columns=columns), file.schema_arrow)
        except Exception as error:  # Arrow has many kinds of errors
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
        return BadFile(self.name, f"cannot be read: {first_line(error)}", "is it a parquet file, and whole?")


def look_at_table(name: str, rows: int, schema: Any) -> Found:
    """The rows and columns of a table, and a note on each column whose texts datasets may have altered.

    Raises BadFile where two columns that say something have one name.
    """
    twice = sorted({column for column in meaningful(schema.names) if schema.names.count(column) > 1})
    if twice:
        raise BadFile(name, f"cannot be read: it has more than one column {', '.join(twice)}")
    notes = []
    for field in schema:
        if field.name in MEANINGFUL and _converter(field.type, field.name) is not None:
            notes.append(
                f"{name} keeps {field.name} as datasets' Json type, in which a text that is JSON cannot be told from "
                f"an object: texts are taken as they are written there, without quotes around them"
            )
    return Found(rows, tuple(schema.names), tuple(notes))


def table_rows(name: str, batches: Iterable[Any], schema: Any) -> Iterator[Row]:
    """The rows of batches of an Arrow table, with values of datasets' Json type decoded."""
    converts = {field.name: _converter(field.type, field.name) for field in schema if field.name in MEANINGFUL}
    number = 0
    for batch in batches:
        for values in batch.to_pylist():
            number += 1
            for column, convert in converts.items():
                if convert is not None:
                    values[column] = convert(values[column])
            yield Row(values, Place(name, number))


def empty_rows(name: str, count: int) -> Iterator[Row]:
    """The rows of a table that has no meaningful column."""
    return (Row({}, Place(name, number)) for number in range(1, count + 1))


def meaningful(names: Iterable[str]) -> list[str]:
    """Those of the columns that are read."""
    return [name for name in names if name in MEANINGFUL]


def _children(kind: Any) -> list[tuple[str, Any]]:
    """The fields of a struct and the values of a list, by name; a list's values have no name of their own."""
    import pyarrow

    if pyarrow.types.is_struct(kind):
        return [(field.name, field.type) for field in kind]
    if hasattr(kind, "value_type") and not pyarrow.types.is_dictionary(kind):
        return [("", kind.value_type)]
    return []


def _converter(kind: Any, name: str) -> Convert | None:
    """What decodes the values of datasets' Json type in a column; None where it has none."""
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
    """A text in quotes is that text, a list of objects (messages, content parts) is the list, all else is a text."""
    decoded = _from_json(value)
    if isinstance(decoded, str) or (isinstance(decoded, list) and all(isinstance(one, dict) for one in decoded)):
        return decoded
    return value
