"""A job's rows: reads files, folders and hub data sets in order, checks each row, and splits train and eval."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from launcher.errors import Problem, RequestError
from launcher.prepare.read_files import file_reader
from launcher.prepare.row_formats import NEEDED, detect_format
from launcher.prepare.row_values import BadRow, without_nulls
from launcher.prepare.rows import CONTENT_COLUMNS, BadFile, Row, RowLocation, RowReader
from launcher.prepare.sources import DataSource

_BATCH = 512
_OTHER_NAMES = {"messages": ("messages", "conversations")}
_TEXTS = {
    "prompt-completion": ("prompt", "completion"),
    "instruction": ("instruction", "input", "output"),
    "text": ("text",),
}
_MAY_BE_MESSAGES = ("prompt", "completion")
_TRAIN, _HELD_OUT = re.compile(r"\btrain", re.I), re.compile(r"\b(test|valid|validation|val|eval|dev)\b", re.I)
_REQUIRED_TO_LEARN = ("messages", "completion", "output", "text")


@dataclass
class Checks:
    """Results of the checks while the rows of one split are read."""

    fingerprints: array[int] = field(default_factory=lambda: array("Q"))
    missing: Counter[str] = field(default_factory=Counter)
    first_missing: dict[str, RowLocation] = field(default_factory=dict)


class Rows:
    """The rows of one split, in the order of its files. Each iteration reads the files again.

    `kind` is the row format; `chosen` marks the rows of the split (None: all); `compared`: keep a fingerprint of each.
    """

    def __init__(
        self,
        readers: Sequence[RowReader],
        key: str,
        *,
        kind: str = "",
        chosen: npt.NDArray[np.bool_] | None = None,
        compared: bool = False,
        counted: tuple[int, tuple[str, ...], tuple[str, ...]] | None = None,
    ) -> None:
        self.readers, self.key, self.kind, self.chosen = tuple(readers), key, kind, chosen
        self.compared = compared
        self.total, self.column_names, self.notes = counted or self._summarise()
        self.checks = Checks()

    def __len__(self) -> int:
        return self.total if self.chosen is None else int(self.chosen.sum())

    def read_as(self, kind: str, *, chosen: npt.NDArray[np.bool_] | None = None, compared: bool = False) -> Rows:
        """These rows, or the `chosen` ones, checked against the format `kind`."""
        counted = (self.total, self.column_names, self.notes)
        return Rows(self.readers, self.key, kind=kind, chosen=chosen, compared=compared, counted=counted)

    def __iter__(self) -> Iterator[Row]:
        """Each row with its location. Raises RequestError for a file or a row that cannot be read as `kind`."""
        self.checks = Checks()
        number = -1
        try:
            rows = itertools.chain.from_iterable(reader.rows() for reader in self.readers)
            for number, row in enumerate(rows):
                if number >= self.total:
                    break
                if self.chosen is not None and not self.chosen[number]:
                    continue
                try:
                    self._check(row)
                except BadRow as error:
                    raise RequestError(row.location.problem(str(error), self.key)) from None
                yield row
        except BadFile as error:
            raise RequestError(error.problem(self.key)) from None
        if number + 1 != self.total:
            message = f"the number of rows changed while reading (it was {self.total})"
            raise RequestError(
                Problem(
                    message,
                    file=self.readers[0].name,
                    key=self.key,
                    hint="start again when no other program writes to the data",
                )
            )
        self._check_missing_columns()

    def batches(self) -> Iterator[list[Row]]:
        """The rows in batches."""
        rows = iter(self)
        while batch := list(itertools.islice(rows, _BATCH)):
            yield batch

    def missing_notes(self) -> list[str]:
        """A note on each column that rows of the last iteration lack: how many, and the consequence."""
        return [
            f"{count} of {len(self)} rows of {self.key} have no {column} ({self.checks.first_missing[column]}"
            f"{' is the first' if count > 1 else ''}): "
            + ("nothing is learned from them" if column in _REQUIRED_TO_LEARN else "they are learned without it")
            for column, count in self.checks.missing.items()
        ]

    def _summarise(self) -> tuple[int, tuple[str, ...], tuple[str, ...]]:
        try:
            summaries = [reader.summary() for reader in self.readers]
        except BadFile as error:
            raise RequestError(error.problem(self.key)) from None
        columns = dict.fromkeys(itertools.chain.from_iterable(summary.columns for summary in summaries))
        notes = [note for summary in summaries for note in summary.notes]
        for name, times in Counter(reader.name for reader in self.readers).items():
            if times > 1:
                notes.append(f"{self.key} names {name} {times} times: its rows are used {times} times")
        if self.key == "data.train":
            notes += _held_out_notes([reader.name for reader in self.readers])
        return sum(summary.rows for summary in summaries), tuple(columns), tuple(notes)

    def _check(self, row: Row) -> None:
        if not self.kind:
            return
        if self.kind == "messages":
            _normalise_messages(row)
        _check_texts(row, _TEXTS.get(self.kind, ()))
        for column in NEEDED[self.kind]:
            if all(row.get(name) is None for name in _OTHER_NAMES.get(column, (column,))):
                self.checks.missing[column] += 1
                self.checks.first_missing.setdefault(column, row.location)
        if self.compared and (fingerprint := _fingerprint(row)) is not None:
            self.checks.fingerprints.append(fingerprint)

    def _check_missing_columns(self) -> None:
        missed = [column for column in _REQUIRED_TO_LEARN if len(self) and self.checks.missing[column] == len(self)]
        if missed:
            found = ", ".join(self.column_names)
            message = f"no row has {' or '.join(_OTHER_NAMES.get(missed[0], missed))}; the columns are {found}"
            hint = f"rows are read as {self.kind}: rename the columns, or set data.format"
            raise RequestError(Problem(message, file=self.readers[0].name, key=self.key, hint=hint))


@dataclass(frozen=True)
class Loaded:
    """A job's rows and their format."""

    kind: str
    train: Rows
    eval: Rows | None

    def notes(self) -> tuple[str, ...]:
        """Notes for the user on the rows, after they have been read."""
        parts = [self.train] + ([self.eval] if self.eval is not None else [])
        return tuple(dict.fromkeys(note for rows in parts for note in (*rows.notes, *rows.missing_notes())))

    def shared_rows(self) -> int:
        """The number of evaluation rows with the content of a training row, after both have been read."""
        if self.eval is None:
            return 0
        train, held_out = (np.asarray(rows.checks.fingerprints, np.uint64) for rows in (self.train, self.eval))
        return int(np.isin(held_out, train).sum())


def load_rows(
    train: DataSource, held_out: DataSource | float | None, *, data_format: str, split: str, eval_split: str, seed: int
) -> Loaded:
    """The rows of a job. Which rows are held out depends only on the seed, the fraction and the number of rows.

    Reads every file once, to report broken files at the start. Raises RequestError.
    """
    rows = Rows(readers_of(train, split, "data.train"), "data.train")
    kind = _format_of(data_format, rows)
    if held_out is None:
        return Loaded(kind, rows.read_as(kind), None)
    if isinstance(held_out, DataSource):
        other = Rows(readers_of(held_out, eval_split, "data.eval"), "data.eval")
        if not len(other):
            raise RequestError(Problem("found no rows", file=other.readers[0].name, key="data.eval"))
        return Loaded(kind, rows.read_as(kind, compared=True), other.read_as(kind, compared=True))
    chosen = held_out_rows(len(rows), held_out, seed)
    evaluated = rows.read_as(kind, chosen=chosen, compared=True)
    evaluated.key, evaluated.notes = "data.eval", ()
    return Loaded(kind, rows.read_as(kind, chosen=~chosen, compared=True), evaluated)


def held_out_rows(rows: int, fraction: float, seed: int) -> npt.NDArray[np.bool_]:
    """True for each held-out row, at least one: the same as in datasets' train_test_split with this seed."""
    count = max(1, round(rows * fraction))
    if count >= rows:
        raise RequestError(Problem(f"{fraction} of {rows} rows leaves no rows to train on", key="data.eval"))
    chosen = np.zeros(rows, dtype=np.bool_)
    chosen[np.random.default_rng(seed).permutation(rows)[:count]] = True
    return chosen


def readers_of(source: DataSource, split: str, key: str) -> list[RowReader]:
    """A reader for each file of a source, or for the split of a stored data set. Raises RequestError."""
    if source.files:
        return [file_reader(path, source.builder) for path in source.files]
    from launcher.prepare.hub_rows import hub_readers, saved_reader

    try:
        if source.saved is not None:
            return [saved_reader(source.saved, split)]
        return hub_readers(source.hub_name or "", source.config, split)
    except BadFile as error:
        raise RequestError(error.problem(key)) from None


def _format_of(requested: str, rows: Rows) -> str:
    if not len(rows):
        raise RequestError(Problem("found no rows", file=rows.readers[0].name, key=rows.key))
    if requested != "auto":
        return requested
    try:
        return detect_format(rows.column_names)
    except BadRow as error:
        hint = "rename the columns, or set data.format"
        raise RequestError(Problem(str(error), file=rows.readers[0].name, key="data.format", hint=hint)) from None


def _held_out_notes(names: Sequence[str]) -> list[str]:
    """A note if data.train includes files named like another split besides files of a train split."""
    words = {name: re.sub(r"[_\d]+", " ", Path(name).name) for name in names}
    if not any(_TRAIN.search(word) for word in words.values()):
        return []
    others = [name for name, word in words.items() if _HELD_OUT.search(word) and not _TRAIN.search(word)]
    named = ", ".join(others[:3])
    return (
        [f"data.train includes {named}, so its rows are trained on: name the other files to exclude it"]
        if others
        else []
    )


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
    for column in _OTHER_NAMES["messages"]:
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
