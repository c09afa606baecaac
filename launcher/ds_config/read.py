"""Reads a DeepSpeed JSON: the data, and the location of every key in the text.

DeepSpeed reads its JSON with hjson, so comments, trailing commas and unquoted keys are allowed here too. hjson does not
keep positions; this reader scans the text with hjson's scanners and records them.
"""

from __future__ import annotations

import copy
import math
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hjson import HjsonDecodeError, HjsonDecoder
from hjson import decoder as scan

from launcher.errors import Problem, RequestError


@dataclass(frozen=True)
class KeyLocation:
    """The location of a key: line and column from 1, and the character offsets of key and value."""

    line: int
    column: int
    key_start: int = -1
    key_end: int = -1
    value_start: int = -1
    value_end: int = -1


@dataclass(frozen=True)
class DsConfig:
    """A DeepSpeed JSON as written: nothing filled in, nothing checked.

    `locations` is keyed by the dotted path ("zero_optimization.stage"). `origin` is the file name that messages print.
    A mapping from a job file has no `text`; its problems are located in `file`, at keys below the key `under`.
    """

    data: dict[str, Any]
    origin: str
    locations: Mapping[str, KeyLocation] = field(default_factory=dict)
    text: str | None = None
    file: str | None = None
    under: str | None = None

    def get(self, path: str, default: Any = None) -> Any:
        """The value at a dotted path, or `default` if it is missing."""
        node: Any = self.data
        for key in path.split("."):
            if not isinstance(node, dict) or key not in node:
                return default
            node = node[key]
        return node

    def location(self, path: str) -> KeyLocation | None:
        """The location of `path`, or of the innermost block around it that has one."""
        while path:
            if path in self.locations:
                return self.locations[path]
            path = path.rpartition(".")[0]
        return None

    def problem(self, path: str, message: str, hint: str | None = None) -> Problem:
        """A `Problem` at the location of `path`."""
        location = self.location(path)
        key = f"{self.under}.{path}" if self.under else path
        return Problem(
            message, file=self.file or self.origin, line=location.line if location else None, key=key, hint=hint
        )


def read_ds_config(path: str | Path) -> DsConfig:
    """The DeepSpeed JSON at `path`.

    Raises:
        RequestError: the file is missing or unreadable, is not JSON, is not one object, or has a duplicate key.
    """
    origin = str(path)
    try:
        # newline="" keeps the line ends: --fix writes the file back.
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            text = file.read()
    except FileNotFoundError:
        raise RequestError(_problem(origin, "file not found")) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(_problem(origin, f"cannot be read: {error}")) from None
    return parse_ds_config(text, origin)


def parse_ds_config(text: str, origin: str) -> DsConfig:
    """The DeepSpeed JSON in `text`; raises RequestError as `read_ds_config` does."""
    reader = _JsonReader(text, origin)
    try:
        data = reader.document()
    except HjsonDecodeError as error:
        raise RequestError(_syntax(error, origin)) from None
    except (IndexError, RecursionError):
        message = "not valid JSON: a comment or a block is not closed"
        raise RequestError(Problem(message, file=origin, line=text.count("\n") + 1, hint=_SYNTAX_HINT)) from None
    if reader.problems:
        raise RequestError(*reader.problems)
    return _with_json_values(DsConfig(data, origin, reader.locations, text))


def from_mapping(data: Mapping[str, Any], origin: str, lines: Mapping[str, int] | None = None) -> DsConfig:
    """An inline mapping of a job file. `lines`: the line of each dotted key path, if known."""
    return _with_json_values(_from_mapping(data, origin, lines))


def from_job(data: Mapping[str, Any], job_file: str, key: str, lines: Mapping[str, int] | None = None) -> DsConfig:
    """The mapping under `key` of a job file. Converts numbers such as 5e8, which YAML 1.1 reads as text."""
    config = _from_mapping(_with_numbers(data), f"{job_file}: {key}", lines)
    return _with_json_values(replace(config, file=job_file, under=key))


def _from_mapping(data: Mapping[str, Any], origin: str, lines: Mapping[str, int] | None) -> DsConfig:
    locations = {path: KeyLocation(line, 1) for path, line in (lines or {}).items()}
    return DsConfig(copy.deepcopy(dict(data)), origin, locations)


def _with_json_values(config: DsConfig) -> DsConfig:
    """The same config. Raises RequestError for keys and values that YAML has and JSON does not, and huge numbers."""
    if problems := [config.problem(path, found) for path, found in _not_json(config.data, "")]:
        raise RequestError(*problems)
    return config


def _not_json(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """The paths of keys and values that a JSON cannot contain, and of numbers that are too large for a float."""
    if isinstance(value, dict):
        for key, inner in value.items():
            where = f"{path}.{key}".lstrip(".")
            yield from (
                _not_json(inner, where) if _is_text(key) else [(ascii(where)[1:-1], "a key must be text in UTF-8")]
            )
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _not_json(inner, f"{path}.{index}")
    elif isinstance(value, int) and abs(value) > sys.float_info.max:
        yield path, "the number is too large"
    elif isinstance(value, str) and not _is_text(value):
        yield path, f"found {value!a}, which is not text in UTF-8"
    elif not isinstance(value, str | int | float | None):
        yield path, f"found {value!r}, which JSON does not have"


def _is_text(value: object) -> bool:
    """Whether a value is text that UTF-8 can represent: "\\ud800" in a YAML or JSON file is half a character."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


_NOT_FINITE = re.compile(r"(-?Infinity|NaN)(?=\s*([,}\]]|$))")
"""As Python's json reads and writes them. hjson would read them as unquoted text."""
_EXPONENT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")


def _with_numbers(node: Any) -> Any:
    if isinstance(node, Mapping):
        return {key: _with_numbers(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_with_numbers(value) for value in node]
    if isinstance(node, str) and _EXPONENT.fullmatch(node):
        number = float(node)
        if not math.isfinite(number):
            return node
        return int(number) if number.is_integer() else number
    return node


_SYNTAX_HINT = "Look for a missing comma, quote or bracket here or just before."


def _problem(origin: str, message: str, hint: str | None = None) -> Problem:
    return Problem(message, file=origin, hint=hint)


def _syntax(error: HjsonDecodeError, origin: str) -> Problem:
    """hjson's message in plain words, at the line of the mistake."""
    message, line = str(error.msg).removesuffix(" at"), error.lineno
    if message == "Bad key name (eof)":
        message = "the text ends inside an object: '}' is missing, or a quote before it"
    elif message.startswith("Invalid control character"):
        message, line = "a quote is not closed on this line", error.doc.count("\n", 0, error.pos - 1) + 1
    return Problem(f"not valid JSON: {message}", file=origin, line=line, hint=_SYNTAX_HINT)


class _JsonReader:
    """Scans a text once: builds the data and records the location of every key."""

    def __init__(self, text: str, origin: str) -> None:
        self.text = text
        self.origin = origin
        self.locations: dict[str, KeyLocation] = {}
        self.problems: list[Problem] = []
        self._numbers = HjsonDecoder()

    def document(self) -> dict[str, Any]:
        char, at = scan.getNext(self.text, 0)
        if char == "":
            return {}
        if char == "[":
            raise HjsonDecodeError("expected one object {…}, found a list", self.text, at)
        data, at = self._object(at + 1, "") if char == "{" else self._object(at, "", bare=True)
        char, at = scan.getNext(self.text, at)
        if char:
            raise HjsonDecodeError("text after the end of the object", self.text, at)
        return data

    def _object(self, at: int, path: str, bare: bool = False) -> tuple[dict[str, Any], int]:
        data: dict[str, Any] = {}
        while True:
            char, at = scan.getNext(self.text, at)
            if char == "}" and not bare:
                return data, at + 1
            if char == "" and bare:
                return data, at
            at = self._entry(at, path, data)
            char, at = scan.getNext(self.text, at)
            at += char == ","

    def _entry(self, at: int, path: str, data: dict[str, Any]) -> int:
        key_start = at
        key, at = scan.scanKeyName(self.text, at)
        key_end = at
        char, at = scan.getNext(self.text, at)
        if char != ":":
            raise HjsonDecodeError("expected ':' after a key", self.text, at)
        _, at = scan.getNext(self.text, at + 1)
        key_path = f"{path}.{key}" if path else key
        self._check_duplicate(key_path, key, data, key_start)
        line, column = self._line_column(key_start)
        value, end = self._value(at, key_path)
        self.locations[key_path] = KeyLocation(line, column, key_start, key_end, at, self._trimmed(at, end))
        data[key] = value
        return end

    def _value(self, at: int, path: str) -> tuple[Any, int]:
        char = self.text[at : at + 1]
        if char == "{":
            return self._object(at + 1, path)
        if char == "[":
            return self._array(at + 1, path)
        if char and char in "\"'":
            multiline = self.text.startswith("'''", at)
            found = scan.mlscanstring(self.text, at) if multiline else scan.scanstring(self.text, at + 1)
        else:
            found = self._bare(at)
        return found[0], found[1]

    def _bare(self, at: int) -> tuple[Any, int]:
        """A number, true, false, null, or text without quotes."""
        if found := _NOT_FINITE.match(self.text, at):
            return float(found[0]), found.end()
        try:
            value, end = scan.scantfnns(self._numbers, self.text, at)
        except (OverflowError, ValueError):
            raise HjsonDecodeError("a number is too large", self.text, at) from None
        if isinstance(value, float) and not math.isfinite(value):
            raise HjsonDecodeError("a number is too large", self.text, at)
        return value, end

    def _array(self, at: int, path: str) -> tuple[list[Any], int]:
        values: list[Any] = []
        while True:
            char, at = scan.getNext(self.text, at)
            if char == "]":
                return values, at + 1
            if char == "":
                raise HjsonDecodeError("a list is not closed: ']' is missing", self.text, at)
            value, at = self._value(at, f"{path}.{len(values)}")
            values.append(value)
            char, at = scan.getNext(self.text, at)
            at += char == ","

    def _check_duplicate(self, key_path: str, key: str, data: dict[str, Any], at: int) -> None:
        if key not in data:
            return
        first = self.locations[key_path].line
        line = self._line_column(at)[0]
        message = f"duplicate key, on line {first} and on line {line}"
        hint = "Keep one of the two: DeepSpeed rejects duplicate keys."
        self.problems.append(Problem(message, file=self.origin, line=line, key=key_path, hint=hint))

    def _line_column(self, at: int) -> tuple[int, int]:
        start = self.text.rfind("\n", 0, at) + 1
        return self.text.count("\n", 0, at) + 1, at - start + 1

    def _trimmed(self, start: int, end: int) -> int:
        return start + len(self.text[start:end].rstrip())
