"""The job of a script of one's own: a job file that need not name model and data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from launcher.job.read import load_job, validate_as
from launcher.job.schema import DataSection, Job, ModelSection


class ScriptJob(Job):
    """A job for `launcher exec`. The script brings its model and data; a model named here is measured for advice."""

    # What carries a job out itself asks for a Job, in which both are there.
    model: ModelSection | None = None  # type: ignore[assignment]
    data: DataSection | None = None  # type: ignore[assignment]


def read_script_job(path: Path, overrides: Sequence[str] = ()) -> ScriptJob:
    """The validated job of a script. Raises RequestError as `read_job` does."""
    data, lines = load_job(path, overrides)
    return validate_as(ScriptJob, data, lines, str(path))


def is_for_a_script(path: Path, overrides: Sequence[str] = ()) -> bool:
    """Whether a job can only be meant for `launcher exec`: it says how long it is, and names neither model nor data."""
    data, _ = load_job(path, overrides)
    train = data.get("train")
    lengths = {"max_steps", "total_samples"}
    return "model" not in data and "data" not in data and isinstance(train, dict) and bool(lengths & set(train))
