"""Rows of a JSON file: one object per line, objects one after the other, an array, or an object with one array."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launcher.prepare.rows import CONTENT_COLUMNS, BadFile, FileSummary, Row, RowLocation
from launcher.prepare.text_files import text_chunks

_BLANK = re.compile(r"[ \t\r\n\ufeff]*")
_LONGEST_LITERAL = len("-Infinity") + 3
_EXAMPLE = 'a row is an object, such as {"text": "…"}'


class _Repeated(dict[str, Any]):
    """An object with the duplicate keys `duplicates`: the first value of each is lost."""

    duplicates: set[str]


class JsonFile:
    """A file of JSON rows. Only little more than one row is in memory at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def name(self) -> str:
        return str(self.path)

    def summary(self) -> FileSummary:
        count, columns = 0, dict[str, None]()
        for row in self.rows():
            count += 1
            if not row.keys() <= columns.keys():
                columns.update(dict.fromkeys(row))
        return FileSummary(count, tuple(columns))

    def rows(self) -> Iterator[Row]:
        text = JsonText(self.path, text_chunks(self.path))
        for number, (line, value) in enumerate(_values(text), 1):
            yield json_row(text, number, line, value)


def json_row(text: JsonText, number: int, line: int, value: Any) -> Row:
    """The row `number`, whose `value` was just read from `text`. Raises BadFile if it is not a row."""
    name = str(text.path)
    if isinstance(value, str):
        value = {"text": value}
    if not isinstance(value, dict):
        raise BadFile(name, f"row {number} cannot be read: it is {_kind_of(value)}", _EXAMPLE, line)
    if text.escaped_surrogate and (column := _unpaired_surrogate(value)):
        raise BadFile(
            name,
            f"row {number} cannot be read: `{column}` has half of a surrogate pair, which is not a character",
            "remove the unpaired \\ud8xx to \\udfxx escape, or write the character itself",
            line,
        )
    if text.repeated and (key := _duplicate_key(value)):
        message = f"row {number} cannot be read: duplicate key `{key}` in one object"
        raise BadFile(name, message, "keep one of the two", line)
    return Row(value, RowLocation(name, number, line))


class JsonText:
    """JSON values one after another, read from `chunks` of a file as they are taken.

    `line` and `row` are those of the first value.
    """

    def __init__(self, path: Path, chunks: Iterator[str], line: int = 1, row: int = 1) -> None:
        self.path, self.chunks = path, chunks
        self.text, self.at, self.line, self.ended = "", 0, line, False
        self.row = row
        self.escaped_surrogate = self.repeated = False
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object)

    def peek(self) -> str:
        """The next non-blank character; "" at the end."""
        while True:
            stop = _BLANK.match(self.text, self.at).end()  # type: ignore[union-attr]
            self._go_to(stop)
            if stop < len(self.text) or self.ended:
                return self.text[stop : stop + 1]
            self._read_more()

    def skip(self) -> None:
        """Skips the character that `peek` returned."""
        self.at += 1

    def skip_line(self) -> None:
        """Skips the rest of a line that was read whole: a row that is not wanted."""
        stop = self.text.find("\n", self.at)
        self.at = stop if stop >= 0 else len(self.text)
        self.row += 1

    def value(self) -> tuple[int, Any]:
        """The first line of the next value, and the value. Raises BadFile."""
        self.peek()
        line = self.line
        self.repeated = False
        while True:
            try:
                value, stop = self._decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                if self.ended or not self._cut_off(error):
                    raise self._broken(error) from None
            except RecursionError:
                raise self._bad(f"row {self.row} cannot be read: it is nested too deeply", self.line) from None
            except ValueError:  # an integer with more digits than Python accepts
                self._decoder = json.JSONDecoder(parse_int=float, object_pairs_hook=self._object)
                continue
            else:
                if stop < len(self.text) or self.ended or self.text[stop - 1] in '}]"':
                    break
            self._read_more()
        surrogates = (self.text.find(escape, self.at, stop) >= 0 for escape in ("\\ud", "\\uD"))
        self.escaped_surrogate = any(surrogates)
        self._go_to(stop)
        self.row += 1
        return line, value

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) == len(pairs):
            return value
        self.repeated = True
        keys = [key for key, _ in pairs]
        repeated = _Repeated(value)
        repeated.duplicates = {key for key in keys if keys.count(key) > 1}
        return repeated

    def unexpected(self, wanted: str, hint: str | None = None) -> BadFile:
        """The error for an unexpected next character."""
        found = self.peek()
        message = f"expected {wanted}, found {found!r}" if found else "the file ends in the middle of its array"
        return self._bad(f"row {self.row} cannot be read: {message}", self.line, hint)

    def _go_to(self, stop: int) -> None:
        self.line += self.text.count("\n", self.at, stop)
        self.at = stop

    def _read_more(self) -> None:
        """Doubles the remaining text: a long row is then not decoded too often."""
        parts = [self.text[self.at :]]
        wanted, got = len(parts[0]), 0
        while not self.ended and got <= wanted:
            chunk = next(self.chunks, None)
            self.ended = chunk is None
            parts.append(chunk or "")
            got += len(parts[-1])
        self.text, self.at = "".join(parts), 0

    def _cut_off(self, error: json.JSONDecodeError) -> bool:
        """Whether more text may resolve the error."""
        return error.msg.startswith("Unterminated string") or error.pos >= len(self.text) - _LONGEST_LITERAL

    def _broken(self, error: json.JSONDecodeError) -> BadFile:
        """The error at its own line; in JSON lines, at the line of the row."""
        stop = self.text.find("\n", self.at)
        first = self.text[self.at : stop if stop >= 0 else len(self.text)]
        if ".jsonl" in self.path.suffixes or ".ndjson" in self.path.suffixes:
            try:
                json.loads(first)
            except json.JSONDecodeError as own:
                column = own.pos + 1 + self.at - (self.text.rfind("\n", 0, self.at) + 1)
                at_end = stop < 0 and own.pos >= len(first.rstrip())
                return self._broken_at(own.msg, self.line, column, at_end, self.at + own.pos)
        line = self.line + self.text.count("\n", self.at, error.pos)
        at_end = error.pos >= len(self.text.rstrip())
        return self._broken_at(error.msg, line, error.pos - self.text.rfind("\n", 0, error.pos), at_end, error.pos)

    def _broken_at(self, reason: str, line: int, column: int, at_end: bool, position: int) -> BadFile:
        if at_end or reason.startswith("Unterminated string"):
            reason = f"the row is cut off ({reason})"
        hint = None
        if self.text.startswith("{'", self.at):
            hint = "JSON needs double quotes: write rows with json.dumps"
        elif reason.startswith("Invalid control character"):
            hint = "write a line break within a text as \\n"
        elif self._has_extra_comma(position):
            hint = "remove the comma: JSON lines have no commas between rows, and lists have none at the end"
        message = f"row {self.row} cannot be read: not valid JSON in column {column}: {reason}"
        return self._bad(message, line, hint)

    def _has_extra_comma(self, position: int) -> bool:
        """Whether the error at `position` is a comma before a row or at the end of a list or object."""
        if self.text.startswith(("]", ","), self.at):
            return True
        return self.text.startswith(("]", "}"), position) and self.text[self.at : position].rstrip().endswith(",")

    def _bad(self, message: str, line: int, hint: str | None = None) -> BadFile:
        return BadFile(str(self.path), message, hint, line)


def _values(text: JsonText) -> Iterator[tuple[int, Any]]:
    """(line, row) of each row of the file, in any arrangement. Raises BadFile."""
    if text.peek() == "[":
        yield from _array_values(text)
        return
    if not text.peek():
        return
    line, first = text.value()
    if not text.peek() and (rows := _single_array(first, text.path)) is not None:
        yield from ((line, row) for row in rows)
        return
    yield line, first
    while text.peek():
        yield text.value()


def _array_values(text: JsonText) -> Iterator[tuple[int, Any]]:
    text.skip()
    if text.peek() == "]":
        text.skip()
    else:
        yield text.value()
        while text.peek() == ",":
            text.skip()
            yield text.value()
        if text.peek() != "]":
            raise text.unexpected("',' or ']'")
        text.skip()
    if text.peek():
        raise text.unexpected("the end of the file", f"write one array of rows, or rows without an array; {_EXAMPLE}")


def _single_array(document: Any, path: Path) -> list[Any] | None:
    """The rows of an object such as {"version": 1, "data": [{…}, …]}; None if the object is itself a row.

    Raises BadFile for an object with several arrays of rows.
    """
    if not isinstance(document, dict) or document.keys() & set(CONTENT_COLUMNS):
        return None
    found = [
        name
        for name, value in document.items()
        if isinstance(value, list) and value and all(isinstance(one, dict) for one in value)
    ]
    if len(found) > 1:
        message = f"cannot be read: it has several arrays of rows: {', '.join(found)}"
        raise BadFile(str(path), message, "write the rows to a separate file")
    return document[found[0]] if found else None


def _duplicate_key(row: dict[str, Any]) -> str | None:
    """A duplicate key in the content columns of a row, or None."""
    own = row.duplicates if isinstance(row, _Repeated) else set()
    if found := sorted(own & set(CONTENT_COLUMNS)):
        return found[0]
    return next((key for name in CONTENT_COLUMNS if (key := _duplicate_within(row.get(name)))), None)


def _duplicate_within(value: Any) -> str | None:
    if isinstance(value, _Repeated):
        return min(value.duplicates)
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((key for one in inner if (key := _duplicate_within(one))), None)


def _unpaired_surrogate(row: dict[str, Any]) -> str | None:
    """The first content column with half of a surrogate pair, or None."""
    for name in CONTENT_COLUMNS:
        if name in row:
            try:
                json.dumps(row[name], ensure_ascii=False).encode()
            except UnicodeEncodeError:
                return name
    return None


def _kind_of(value: Any) -> str:
    return "a list" if isinstance(value, list) else json.dumps(value)
