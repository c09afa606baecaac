"""Tokenises the rows of one part: reads, checks, renders and encodes them. The result depends on the part alone."""

from __future__ import annotations

import contextlib
import gc
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from launcher.errors import RequestError
from launcher.prepare.chat_template import ChatTemplate
from launcher.prepare.conversations import Reason
from launcher.prepare.encode import Encoded, Encoder
from launcher.prepare.row_checks import RowChecks
from launcher.prepare.row_formats import Example, Reader
from launcher.prepare.row_parts import LinePart, NotLines, Part
from launcher.prepare.row_values import BadRow
from launcher.prepare.rows import BadFile, Row
from launcher.prepare.text_tokenizer import TextTokenizer
from launcher.token_store import Sequences

_BATCH_ROWS = 512
_BATCH_CHARACTERS = 1 << 18


@dataclass(frozen=True)
class TemplateSettings:
    """The arguments of `ChatTemplate`."""

    source: str | Mapping[str, str]
    name: str
    special_tokens: Mapping[str, Any]
    tokens: tuple[str, ...]
    kwargs: Mapping[str, Any]

    def template(self) -> ChatTemplate:
        """A template without any memory of conversations."""
        return ChatTemplate(self.source, self.name, self.special_tokens, self.tokens, self.kwargs)


@dataclass(frozen=True)
class SplitSettings:
    """How the rows of one split are read and tokenised.

    `key` is the split's key in the job. `padded` is as in `Reader`, and `compared` as in `RowChecks`.
    """

    key: str
    kind: str
    template: TemplateSettings | None
    learn: Literal["all", "last"]
    padded: bool
    compared: bool


@dataclass
class Counts:
    """What was found in rows: how many there are, and in how many conversations each thing occurs."""

    rows: int = 0
    cut: int = 0
    partly: int = 0
    shortened: int = 0
    open_ended: int = 0
    largest: int = -1
    unwritten: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    columns: dict[str, None] = field(default_factory=dict)

    def add(self, later: Counts) -> None:
        """Adds the counts of the rows that follow."""
        for name in ("rows", "cut", "partly", "shortened", "open_ended"):
            setattr(self, name, getattr(self, name) + getattr(later, name))
        self.largest = max(self.largest, later.largest)
        self.unwritten += later.unwritten
        self.dropped += later.dropped
        self.columns.update(later.columns)

    def to_json(self) -> dict[str, Any]:
        """The counts as JSON types."""
        return {**vars(self), "columns": list(self.columns)}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Counts:
        """The counts that `to_json` returned."""
        counted = {name: Counter(found[name]) for name in ("unwritten", "dropped")}
        return cls(**{**found, **counted, "columns": dict.fromkeys(found["columns"])})


@dataclass(frozen=True)
class TokenisedPart:
    """The sequences of a part, and what was found in its rows."""

    sequences: Sequences
    counts: Counts
    checks: RowChecks


class PartTokeniser:
    """Tokenises parts, with one tokenizer."""

    def __init__(self, tokenizer: TextTokenizer, max_length: int) -> None:
        self._encoders = {divide: Encoder(tokenizer, max_length, divide) for divide in (False, True)}

    def tokenise(self, part: Part, split: SplitSettings) -> TokenisedPart:
        """Tokenises the rows of a part. Raises RequestError for the first bad row, and NotLines."""
        # A template remembers conversations: a new one for each part keeps parts independent of each other.
        template = split.template.template() if split.template is not None else None
        reader = Reader(split.kind, template, split.learn, split.padded)
        one = _PartRows(reader, self._encoders[split.kind == "text"], RowChecks(split.kind, split.compared), split.key)
        with _collector_off():
            for batch in _batches(one.examples(part)):
                one.add(batch)
            return one.result()


@contextlib.contextmanager
def _collector_off() -> Iterator[None]:
    """Turns the garbage collector off: it would visit every list of ids several times. A part leaves little behind."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _PartRows:
    def __init__(self, reader: Reader, encoder: Encoder, checks: RowChecks, key: str) -> None:
        self.reader, self.encoder, self.checks, self.key = reader, encoder, checks, key
        self.counts = Counts()
        self.tokens, self.learned = array("i"), bytearray()
        self.lengths: list[int] = []
        self.targets: list[int] = []

    def examples(self, part: Part) -> Iterator[Example | Reason]:
        """What each row gives. Raises RequestError."""
        try:
            for row in part.rows():
                self.counts.rows += 1
                if not row.keys() <= self.counts.columns.keys():
                    self.counts.columns.update(dict.fromkeys(row))
                yield self._read(row)
        except BadFile as error:
            if isinstance(part, LinePart):
                raise NotLines from None  # reading the file from its start finds the error, or none
            raise RequestError(error.problem(self.key)) from None

    def _read(self, row: Row) -> Example | Reason:
        try:
            self.checks.check(row)
            return self.reader.read(row)
        except BadRow as error:
            raise RequestError(row.location.problem(str(error), self.key)) from None

    def add(self, batch: Sequence[Example | Reason]) -> None:
        encoded = iter(self.encoder.encode([one for one in batch if isinstance(one, Example)]))
        for one in batch:
            reason = one if isinstance(one, Reason) else self._add(one, next(encoded))
            if reason is not None:
                self.counts.dropped[str(reason)] += 1

    def _add(self, example: Example, encoded: Encoded) -> Reason | None:
        counts = self.counts
        counts.partly += example.partly
        counts.shortened += example.shortened
        counts.open_ended += example.open_ended
        counts.cut += encoded.cut
        if example.unwritten:
            counts.unwritten[example.unwritten] += 1
        kept = False
        for tokens, learned in encoded.sequences:
            targets = learned.count(1, 1)
            if targets:
                kept = True
                self.tokens.extend(array("i", tokens))
                self.learned += learned
                self.lengths.append(len(learned))
                self.targets.append(targets)
        if kept:
            return None
        return Reason.CUT if encoded.cut else Reason.NO_TARGET

    def result(self) -> TokenisedPart:
        if self.tokens:
            self.counts.largest = int(np.frombuffer(self.tokens, dtype=np.int32).max())
        lengths, targets = np.asarray(self.lengths, dtype=np.int64), np.asarray(self.targets, dtype=np.int32)
        sequences = Sequences(self.tokens.tobytes(), bytes(self.learned), lengths, targets)
        return TokenisedPart(sequences, self.counts, self.checks)


def _batches(examples: Iterator[Example | Reason]) -> Iterator[list[Example | Reason]]:
    """The examples in batches of limited size: an encoding takes about a hundred bytes per character."""
    batch: list[Example | Reason] = []
    size = 0
    for one in examples:
        batch.append(one)
        size += len(one.text) if isinstance(one, Example) else 0
        if size >= _BATCH_CHARACTERS or len(batch) == _BATCH_ROWS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
