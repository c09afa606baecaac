"""Warnings about the rows as they were read, and about the evaluation rows."""

from __future__ import annotations

from launcher.job import Job
from launcher.plan.facts import DataFacts


def data_warnings(job: Job, data: DataFacts) -> list[str]:
    """The notes from reading the rows, and warnings about evaluation rows."""
    return [*data.notes, *eval_warnings(job, data)]


def eval_warnings(job: Job, data: DataFacts) -> list[str]:
    """Warnings about evaluation rows that are also training rows, are cut or skipped, or count only in part."""
    held_out = data.eval
    if held_out is None:
        return []
    warnings = []
    if data.shared_rows:
        warnings.append(
            f"{data.shared_rows} of {held_out.rows} evaluation rows are also training rows, so the evaluation loss "
            f"says less about new text{_another_split(job)}"
        )
    if held_out.cut:
        warnings.append(f"{held_out.cut} of {held_out.rows} evaluation rows are cut at {job.data.max_length} tokens")
    if held_out.dropped:
        warnings.append(f"{held_out.dropped} of {held_out.rows} evaluation rows have no target tokens and are skipped")
    if held_out.partly_learned:
        warnings.append(
            f"in {held_out.partly_learned} evaluation conversations some assistant turns are not evaluated: the "
            f"chat template changes them when other turns follow"
        )
    return warnings


def _another_split(job: Job) -> str:
    same = job.data.eval == job.data.train and job.data.eval_split in (None, job.data.split)
    return "; data.eval is the same as data.train (for a hub data set, set data.eval_split)" if same else ""
