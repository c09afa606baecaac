"""What a user should know about how the rows were read, and about the rows that are evaluated on."""

from __future__ import annotations

from launcher.job import Job
from launcher.plan.facts import DataFacts


def data_warnings(job: Job, data: DataFacts) -> list[str]:
    """The notes of reading, and what happened to evaluation rows."""
    return [*data.notes, *eval_warnings(job, data)]


def eval_warnings(job: Job, data: DataFacts) -> list[str]:
    """Evaluation rows that are trained on, cut, left out or learned in part."""
    held_out = data.eval
    if held_out is None:
        return []
    warnings = []
    if data.shared_rows:
        warnings.append(
            f"{data.shared_rows} of {held_out.rows} evaluation rows are training rows too, so the evaluation loss says "
            f"less about new text{_another_split(job)}"
        )
    if held_out.cut:
        warnings.append(f"{held_out.cut} of {held_out.rows} evaluation rows are cut at {job.data.max_length} tokens")
    if held_out.dropped:
        warnings.append(f"{held_out.dropped} of {held_out.rows} evaluation rows have no target and are left out")
    if held_out.partly_learned:
        warnings.append(
            f"in {held_out.partly_learned} evaluation conversations some assistant turns are not counted: the chat "
            f"template rewrites them once other turns follow"
        )
    return warnings


def _another_split(job: Job) -> str:
    same = job.data.eval == job.data.train and job.data.eval_split in (None, job.data.split)
    return (
        "; data.eval names the same as data.train (of a hub data set, data.eval_split takes another split)"
        if same
        else ""
    )
