"""Reads, renders and tokenises the rows of one split into a token store, and counts the outcomes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.errors import Problem, RequestError
from launcher.plan.facts import SplitFacts
from launcher.prepare.chat_template import date_note
from launcher.prepare.conversations import Reason
from launcher.prepare.encode import Encoded, Encoder
from launcher.prepare.row_formats import Example, Reader, unused_columns
from launcher.prepare.row_values import BadRow
from launcher.prepare.rows import Row
from launcher.token_store import TokenWriter

Progress = Callable[..., None]
_HINTS = {
    Reason.CUT: "raise data.max_length",
    Reason.NOT_FOUND: "set data.chat_template to a template that writes assistant turns after its generation prompt",
    Reason.NO_ASSISTANT: "messages need a turn of role assistant",
}


@dataclass
class _Counts:
    rows: int = 0
    cut: int = 0
    partly: int = 0
    shortened: int = 0
    open_ended: int = 0
    largest: int = -1
    unwritten: Counter[str] = field(default_factory=Counter)
    dropped: Counter[Reason] = field(default_factory=Counter)
    columns: set[str] = field(default_factory=set)


class SplitWriter:
    """Writes the examples from `reader`, tokenised by `encoder`, to token stores."""

    def __init__(self, reader: Reader, encoder: Encoder, progress: Progress) -> None:
        self.reader, self.encoder, self.progress = reader, encoder, progress

    def write(
        self, batches: Iterable[Sequence[Row]], total: int, folder: Path, key: str, columns: Iterable[str] = ()
    ) -> SplitFacts:
        """Writes the split `key` of the job to `folder`. `columns`: the columns of its files.

        Raises RequestError if no row has anything to learn.
        """
        counts = _Counts(columns=set(columns))
        with TokenWriter(folder) as writer:
            for batch in batches:
                self._batch(batch, counts, writer, key)
                self.progress(done=counts.rows, total=total, message=f"tokenising {key}")
            facts = writer.facts()
        if not facts["sequences"]:
            raise RequestError(_nothing_to_learn(counts, self.reader.kind, key))
        return SplitFacts(
            folder=str(folder),
            rows=counts.rows,
            cut=counts.cut,
            dropped=counts.dropped.total(),
            dropped_because={str(reason): number for reason, number in counts.dropped.most_common()},
            partly_learned=counts.partly,
            largest_token=counts.largest,
            notes=tuple(self._notes(counts)),
            **facts,
        )

    def _batch(self, batch: Sequence[Row], counts: _Counts, writer: TokenWriter, key: str) -> None:
        found = [self._read(row, key) for row in batch]
        examples = [one for one in found if isinstance(one, Example)]
        encoded = iter(self.encoder.encode(examples))
        for one in found:
            reason = one if isinstance(one, Reason) else self._add(one, next(encoded), counts, writer)
            if reason is not None:
                counts.dropped[reason] += 1
        for row in batch:
            counts.columns.update(row)
        counts.rows += len(batch)

    def _read(self, row: Row, key: str) -> Example | Reason:
        try:
            return self.reader.read(row)
        except BadRow as error:
            raise RequestError(row.location.problem(str(error), key)) from None

    def _add(self, example: Example, encoded: Encoded, counts: _Counts, writer: TokenWriter) -> Reason | None:
        counts.partly += example.partly
        counts.shortened += example.shortened
        counts.open_ended += example.open_ended
        counts.cut += encoded.cut
        if example.unwritten:
            counts.unwritten[example.unwritten] += 1
        kept = [(tokens, learned) for tokens, learned in encoded.sequences if any(learned[1:])]
        for tokens, learned in kept:
            writer.add(tokens, learned)
            counts.largest = max(counts.largest, max(tokens))
        if kept:
            return None
        return Reason.CUT if encoded.cut else Reason.NO_TARGET

    def _notes(self, counts: _Counts) -> list[str]:
        """Notes for the user on how the rows were read."""
        notes = []
        template = self.reader.template
        if unused := unused_columns(counts.columns, self.reader.kind):
            notes.append(f"unused columns: {', '.join(unused)}")
        if counts.open_ended:
            notes.append(
                f"in {counts.open_ended} conversations the chat template does not write an end of turn after the last "
                f"answer: the model does not learn to stop there"
            )
        for prompt, number in counts.unwritten.most_common(1):
            notes.append(
                f"in {number} conversations the generation prompt ends in {prompt!r}, which the chat template does not "
                f"write before the last answer: at inference the prompt differs from training"
            )
        if counts.shortened:
            notes.append(
                f"in {counts.shortened} conversations the chat template drops part of the assistant's text, such as "
                f"the reasoning of earlier answers; the dropped part is not learned"
            )
        if template is not None and self.reader.kind != "text" and template.writes_date:
            notes.append(date_note())
        if self.encoder.end is None and self.reader.kind in ("text", "prompt-completion"):
            notes.append("the tokenizer has no end-of-text token: the model does not learn to stop")
        return notes


def _nothing_to_learn(counts: _Counts, kind: str, key: str) -> Problem:
    """The error for a split in which no row has anything to learn."""
    reasons = ", ".join(f"{number} {reason}" for reason, number in counts.dropped.most_common())
    most: Any = counts.dropped.most_common(1)
    hint = _HINTS.get(most[0][0]) if most else None
    message = f"none of {counts.rows} rows, read as {kind}, has anything to learn: {reasons or 'found no rows'}"
    return Problem(message, key=key, hint=hint or "check the rows and data.format")
