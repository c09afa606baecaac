"""Writes the tokenised rows of one split into a token store, and describes what was found in them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from launcher.errors import Problem, RequestError
from launcher.plan.facts import SplitFacts
from launcher.prepare.chat_template import date_note
from launcher.prepare.conversations import Reason
from launcher.prepare.part_processes import PartProcesses
from launcher.prepare.part_tokeniser import Counts, SplitSettings
from launcher.prepare.read_rows import Rows
from launcher.prepare.row_checks import RowChecks
from launcher.prepare.row_formats import unused_columns
from launcher.prepare.row_parts import PART_BYTES
from launcher.prepare.split_store import SplitStore

Progress = Callable[..., None]
_SHOWN_EVERY_SECONDS = 5.0
_HINTS: dict[str, str] = {
    Reason.CUT: "raise data.max_length",
    Reason.NOT_FOUND: "set data.chat_template to a template that writes assistant turns after its generation prompt",
    Reason.NO_ASSISTANT: "messages need a turn of role assistant",
}


class SplitWriter:
    """Writes the rows of one split, tokenised by `processes`, to a token store."""

    def __init__(self, settings: SplitSettings, processes: PartProcesses, progress: Progress) -> None:
        self.settings, self.processes, self.progress = settings, processes, progress

    def write(self, rows: Rows, folder: Path, ends: bool) -> SplitFacts:
        """Writes the split to `folder`, after the parts that are there. `ends`: the tokenizer has an end-of-text token.

        Raises RequestError for a bad row, or if no row has anything to learn, and NotLines.
        """
        settings = self.settings
        rows.checks = RowChecks(settings.kind, settings.compared)
        way = "lines" if rows.lines else "packed"
        identity = f"{len(rows)} rows, {settings.kind}, {way} in parts of {PART_BYTES}"
        store = SplitStore(folder, identity, rows.checks)
        try:
            shown = _ShownProgress(self.progress, f"tokenising {settings.key}", len(rows), store.counts.rows)
            parts = itertools.islice(rows.parts(), store.finished, None)
            for part in self.processes.tokenise(parts, settings):
                store.add(part)
                shown.show(store.counts.rows)
            rows.column_names = tuple(dict.fromkeys((*rows.column_names, *store.counts.columns)))
            rows.check_missing_columns()
            store.complete()
        finally:
            store.close()
        if not store.facts()["sequences"]:
            raise RequestError(_nothing_to_learn(store.counts, settings))
        counts = store.counts
        return SplitFacts(
            folder=str(folder),
            rows=counts.rows,
            cut=counts.cut,
            dropped=counts.dropped.total(),
            dropped_because=dict(counts.dropped.most_common()),
            partly_learned=counts.partly,
            largest_token=counts.largest,
            notes=tuple(self._notes(counts, rows.column_names, ends)),
            **store.facts(),
        )

    def _notes(self, counts: Counts, columns: Iterable[str], ends: bool) -> list[str]:
        """Notes for the user on how the rows were read."""
        notes = []
        kind = self.settings.kind
        template = self.settings.template.template() if self.settings.template is not None else None
        if unused := unused_columns(columns, kind):
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
        if template is not None and kind != "text" and template.writes_date:
            notes.append(date_note())
        if not ends and kind in ("text", "prompt-completion"):
            notes.append("the tokenizer has no end-of-text token: the model does not learn to stop")
        return notes


class _ShownProgress:
    """Reports the first part, then one every few seconds, with the speed and the time that is left."""

    def __init__(self, progress: Progress, message: str, total: int, finished: int) -> None:
        self._progress, self._message, self._total, self._finished = progress, message, total, finished
        self._began = time.monotonic()
        self._shown: float | None = None

    def show(self, rows: int) -> None:
        """Reports that `rows` rows are tokenised."""
        now = time.monotonic()
        if self._shown is not None and now - self._shown < _SHOWN_EVERY_SECONDS and rows < self._total:
            return
        per_second = (rows - self._finished) / max(now - self._began, 1e-3)
        left = (self._total - rows) / per_second if self._shown is not None and per_second else None
        self._shown = now
        self._progress(
            message=self._message,
            done=rows,
            total=self._total,
            rows_per_second=round(per_second, 1),
            seconds_left=None if left is None else round(left),
        )


def _nothing_to_learn(counts: Counts, settings: SplitSettings) -> Problem:
    """The error for a split in which no row has anything to learn."""
    reasons = ", ".join(f"{number} {reason}" for reason, number in counts.dropped.most_common())
    most = next(iter(counts.dropped.most_common(1)), None)
    hint = _HINTS.get(most[0]) if most else None
    message = (
        f"none of {counts.rows} rows, read as {settings.kind}, has anything to learn: {reasons or 'found no rows'}"
    )
    return Problem(message, key=settings.key, hint=hint or "check the rows and data.format")
