"""Checks rows against a row format, and counts what they lack."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from launcher.prepare.row_formats import NEEDED
from launcher.prepare.row_values import BadRow, without_nulls
from launcher.prepare.rows import CONTENT_COLUMNS, Row

OTHER_NAMES = {"messages": ("messages", "conversations")}
"""The other names of a column."""
_TEXTS = {
    "prompt-completion": ("prompt", "completion"),
    "instruction": ("instruction", "input", "output"),
    "text": ("text",),
}
_MAY_BE_MESSAGES = ("prompt", "completion")


@dataclass
class RowChecks:
    """Checks the rows of one split against the format `kind` ("": no checks), and counts the results.

    `missing` counts the rows without each needed column; `first_missing` locates the first. `compared`: keep a
    fingerprint of each row, to find rows that are in two splits.
    """

    kind: str = ""
    compared: bool = False
    fingerprints: array[int] = field(default_factory=lambda: array("Q"))
    missing: Counter[str] = field(default_factory=Counter)
    first_missing: dict[str, str] = field(default_factory=dict)

    def check(self, row: Row) -> None:
        """Checks a row, and converts its messages to a list of messages. Raises BadRow."""
        if not self.kind:
            return
        if self.kind == "messages":
            _normalise_messages(row)
        _check_texts(row, _TEXTS.get(self.kind, ()))
        for column in NEEDED[self.kind]:
            if all(row.get(name) is None for name in OTHER_NAMES.get(column, (column,))):
                self.missing[column] += 1
                self.first_missing.setdefault(column, str(row.location))
        if self.compared and (fingerprint := _fingerprint(row)) is not None:
            self.fingerprints.append(fingerprint)

    def add(self, later: RowChecks) -> None:
        """Adds the results of the rows that follow."""
        self.fingerprints += later.fingerprints
        self.missing += later.missing
        for column, location in later.first_missing.items():
            self.first_missing.setdefault(column, location)


def _check_texts(row: Row, columns: Sequence[str]) -> None:
    """Raises BadRow if one of the columns has neither text nor, where allowed, messages."""
    wrong = [name for name in columns if row.get(name) is not None and not _is_text_or_messages(name, row[name])]
    lists = [name for name in wrong if isinstance(row[name], list)]
    if lists:
        are = "are lists" if len(lists) > 1 else "is a list"
        raise BadRow(f"{' and '.join(lists)} {are}; each row must have one text there, in a separate object")
    if wrong:
        raise BadRow(f"{wrong[0]} must be text, found {_describe(row[wrong[0]])}")


def _is_text_or_messages(column: str, value: Any) -> bool:
    if isinstance(value, list):
        return column in _MAY_BE_MESSAGES and not any(isinstance(one, str) for one in value)
    return isinstance(value, str)


def _normalise_messages(row: Row) -> None:
    """Converts messages in JSON text, or in a list per field, to a list of messages. Raises BadRow."""
    for column in OTHER_NAMES["messages"]:
        value = row.get(column)
        if isinstance(value, str):
            row[column] = _from_json_text(column, value)
        elif isinstance(value, Mapping):
            turns = _rows_of_columns(value)
            if turns is None:
                raise BadRow(
                    f"{column} must be a list of messages, found an object with {', '.join(value) or 'nothing'}"
                )
            row[column] = turns


def _from_json_text(column: str, text: str) -> Any:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, list):
        raise BadRow(f"{column} must be a list of messages, or that list as JSON text, found {text[:60]!r}")
    return found


def _rows_of_columns(value: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """[{"role": …}, …] from {"role": […], …}; None if the fields are not lists of equal length."""
    fields = list(value.values())
    if not fields or not all(isinstance(one, list) and len(one) == len(fields[0]) for one in fields):
        return None
    return [dict(zip(value, turn, strict=True)) for turn in zip(*fields, strict=True)]


def _describe(value: Any) -> str:
    kinds: dict[type, str] = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        bytes: "bytes",
        dict: "an object",
    }
    return f"{kinds.get(type(value), type(value).__name__)} ({str(value)[:60]})"


def _fingerprint(row: Row) -> int | None:
    """A 64-bit hash of a row's content columns without nulls; None if they are empty."""
    content = {name: without_nulls(row[name]) for name in CONTENT_COLUMNS if row.get(name)}
    if not content:
        return None
    text = json.dumps(content, sort_keys=True, default=str)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())
