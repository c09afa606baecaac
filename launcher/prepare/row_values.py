"""Checks and conversions of a row's values that all formats share."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

Row = Mapping[str, Any]
_BYTE_ORDER_MARK = "\ufeff"


class BadRow(ValueError):
    """A row that does not match its format."""


def text_of(row: Row, name: str) -> str:
    """The text of a column without a leading byte order mark; "" if it is missing. Raises BadRow."""
    value = row.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadRow(f"{name} must be text, found {kind_of(value)}")
    return without_mark(value)


def list_of(row: Row, name: str) -> list[Any]:
    """The list in a column, which may be JSON text. Raises BadRow."""
    value = from_json(row[name], name)
    if not isinstance(value, list):
        raise BadRow(f"{name} must be a list, found {kind_of(value)}")
    return value


def without_mark(text: str) -> str:
    """`text` without a leading byte order mark."""
    return text.removeprefix(_BYTE_ORDER_MARK)


def from_json(value: Any, name: str) -> Any:
    """`value`, parsed if it is JSON text. Raises BadRow with `name` for text that is not JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(without_mark(value))
    except ValueError as error:
        raise BadRow(f"{name} is text that is not JSON ({error}): {value[:60]!r}") from None


def without_nulls(value: Any) -> Any:
    """`value` without null keys at every depth: parquet adds the keys of other rows as nulls."""
    if isinstance(value, Mapping):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def kind_of(value: Any) -> str:
    """The type of a JSON value, for messages."""
    return "null" if value is None else type(value).__name__
