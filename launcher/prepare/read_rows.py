"""A job's rows: reads files, folders and hub data sets in order, checks each row, and splits train and eval."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from launcher.errors import Problem, RequestError
from launcher.prepare.json_rows import JsonFile
from launcher.prepare.read_files import file_reader
from launcher.prepare.row_checks import OTHER_NAMES, RowChecks
from launcher.prepare.row_formats import detect_format
from launcher.prepare.row_parts import LinePart, Part, packed_parts, parts_of_lines
from launcher.prepare.row_values import BadRow
from launcher.prepare.rows import BadFile, Row, RowReader
from launcher.prepare.sources import DataSource

_TRAIN, _HELD_OUT = re.compile(r"\btrain", re.I), re.compile(r"\b(test|valid|validation|val|eval|dev)\b", re.I)
_REQUIRED_TO_LEARN = ("messages", "completion", "output", "text")


class Rows:
    """The rows of one split, in the order of its files. Each iteration reads the files again.

    `kind` is the row format; `chosen` marks the rows of the split (None: all); `compared`: keep a fingerprint of each.
    `lines`: the parts of files that are cut by lines (`parts_of_lines`); the rows were counted, but not read yet.
    """

    def __init__(
        self,
        readers: Sequence[RowReader],
        key: str,
        *,
        kind: str = "",
        chosen: npt.NDArray[np.bool_] | None = None,
        compared: bool = False,
        lines: Sequence[LinePart] | None = None,
        counted: tuple[int, tuple[str, ...], tuple[str, ...]] | None = None,
    ) -> None:
        self.readers, self.key, self.kind, self.chosen = tuple(readers), key, kind, chosen
        self.compared, self.lines = compared, lines
        self.total, self.column_names, self.notes = counted or self._summarise()
        self.checks = RowChecks(kind, compared)

    def __len__(self) -> int:
        return self.total if self.chosen is None else int(self.chosen.sum())

    def read_as(self, kind: str, *, chosen: npt.NDArray[np.bool_] | None = None, compared: bool = False) -> Rows:
        """These rows, or the `chosen` ones, checked against the format `kind`."""
        counted = (self.total, self.column_names, self.notes)
        return Rows(
            self.readers, self.key, kind=kind, chosen=chosen, compared=compared, lines=self.lines, counted=counted
        )

    def __iter__(self) -> Iterator[Row]:
        """Each row with its location. Raises RequestError for a file or a row that cannot be read as `kind`."""
        self.checks = RowChecks(self.kind, self.compared)
        for row in self._unchecked():
            try:
                self.checks.check(row)
            except BadRow as error:
                raise RequestError(row.location.problem(str(error), self.key)) from None
            yield row
        self.check_missing_columns()

    def parts(self) -> Iterator[Part]:
        """The rows in parts. Raises RequestError for a file that cannot be read; the rows are not checked."""
        if self.lines is None:
            yield from packed_parts(self._unchecked())
            return
        first = 0
        for part in self.lines:
            if self.chosen is not None:
                yield dataclasses.replace(part, chosen=self.chosen[first : first + part.count])
            else:
                yield part
            first += part.count

    def _unchecked(self) -> Iterator[Row]:
        number = -1
        try:
            rows = itertools.chain.from_iterable(reader.rows() for reader in self.readers)
            for number, row in enumerate(rows):
                if number >= self.total:
                    break
                if self.chosen is not None and not self.chosen[number]:
                    continue
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

    def missing_notes(self) -> list[str]:
        """A note on each column that rows of the last iteration lack: how many, and the consequence."""
        return [
            f"{count} of {len(self)} rows of {self.key} have no {column} ({self.checks.first_missing[column]}"
            f"{' is the first' if count > 1 else ''}): "
            + ("nothing is learned from them" if column in _REQUIRED_TO_LEARN else "they are learned without it")
            for column, count in self.checks.missing.items()
        ]

    def _summarise(self) -> tuple[int, tuple[str, ...], tuple[str, ...]]:
        if self.lines is not None:
            first = dict.fromkeys(itertools.chain.from_iterable(self.lines[0].rows()))
            return sum(part.count for part in self.lines), tuple(first), tuple(self._notes())
        try:
            summaries = [reader.summary() for reader in self.readers]
        except BadFile as error:
            raise RequestError(error.problem(self.key)) from None
        columns = dict.fromkeys(itertools.chain.from_iterable(summary.columns for summary in summaries))
        notes = [note for summary in summaries for note in summary.notes]
        return sum(summary.rows for summary in summaries), tuple(columns), (*notes, *self._notes())

    def _notes(self) -> list[str]:
        notes = []
        for name, times in Counter(reader.name for reader in self.readers).items():
            if times > 1:
                notes.append(f"{self.key} names {name} {times} times: its rows are used {times} times")
        if self.key == "data.train":
            notes += _held_out_notes([reader.name for reader in self.readers])
        return notes

    def check_missing_columns(self) -> None:
        """Raises RequestError if none of the rows that were checked has a column that is needed to learn."""
        missed = [column for column in _REQUIRED_TO_LEARN if len(self) and self.checks.missing[column] == len(self)]
        if missed:
            found = ", ".join(self.column_names)
            message = f"no row has {' or '.join(OTHER_NAMES.get(missed[0], missed))}; the columns are {found}"
            hint = f"rows are read as {self.kind}: rename the columns, or set data.format"
            raise RequestError(Problem(message, file=self.readers[0].name, key=self.key, hint=hint))


@dataclass(frozen=True)
class Loaded:
    """A job's rows and their format."""

    kind: str
    train: Rows
    eval: Rows | None

    def splits(self) -> list[Rows]:
        """The rows of each split."""
        return [self.train] if self.eval is None else [self.train, self.eval]

    def notes(self) -> tuple[str, ...]:
        """Notes for the user on the rows, after they have been read."""
        return tuple(dict.fromkeys(note for rows in self.splits() for note in (*rows.notes, *rows.missing_notes())))

    def shared_rows(self) -> int:
        """The number of evaluation rows with the content of a training row, after both have been read."""
        if self.eval is None:
            return 0
        train, held_out = (np.asarray(rows.checks.fingerprints, np.uint64) for rows in (self.train, self.eval))
        return int(np.isin(held_out, train).sum())


def load_rows(
    train: DataSource,
    held_out: DataSource | float | None,
    *,
    data_format: str,
    split: str,
    eval_split: str,
    seed: int,
    by_lines: bool = False,
) -> Loaded:
    """The rows of a job. Which rows are held out depends only on the seed, the fraction and the number of rows.

    Reads every file once, to report broken files at the start. With `by_lines` large files with a JSON object on each
    line are not read: their lines are counted, and `auto` takes the format from the first part. Raises RequestError.
    """
    rows = _counted(readers_of(train, split, "data.train"), "data.train", by_lines)
    kind = _format_of(data_format, rows)
    if held_out is None:
        return Loaded(kind, rows.read_as(kind), None)
    if isinstance(held_out, DataSource):
        other = _counted(readers_of(held_out, eval_split, "data.eval"), "data.eval", by_lines)
        if not len(other):
            raise RequestError(Problem("found no rows", file=other.readers[0].name, key="data.eval"))
        return Loaded(kind, rows.read_as(kind, compared=True), other.read_as(kind, compared=True))
    chosen = held_out_rows(len(rows), held_out, seed)
    evaluated = rows.read_as(kind, chosen=chosen, compared=True)
    evaluated.key, evaluated.notes = "data.eval", ()
    return Loaded(kind, rows.read_as(kind, chosen=~chosen, compared=True), evaluated)


def _counted(readers: Sequence[RowReader], key: str, by_lines: bool) -> Rows:
    files = [reader.path for reader in readers if isinstance(reader, JsonFile)]
    lines = parts_of_lines(files) if by_lines and len(files) == len(readers) else None
    return Rows(readers, key, lines=lines)


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
