"""What the batch script of a Slurm job asks about its run: to save and stop, and whether it has finished."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from launcher.errors import Problem, RequestError
from launcher.job import AnyJob, load_job
from launcher.job.user_path import user_path
from launcher.run_dir import RunDir
from launcher.runs.rest import planned_run
from launcher.slurm.allocation import run_stamp


def run_directory(job: AnyJob, name: str, stamp: str) -> RunDir:
    """The run directory of a job in the allocation with this stamp."""
    return RunDir((user_path(job.output_dir, "output_dir") / f"{name}-{stamp}").resolve())


def stop_run_of_job(job_file: Path, overrides: Sequence[str], command: Sequence[str] | None) -> None:
    """Asks the run of this allocation to save and stop. Raises RequestError."""
    job = load_job(job_file, *overrides, command=command).job
    _request_stop(run_directory(job, job.name, run_stamp(os.environ)))


def stop_resumed_run(run: Path) -> None:
    """Asks a resumed run to save and stop. Raises RequestError."""
    _request_stop(planned_run(run))


def run_of_job_has_finished(job_file: Path, overrides: Sequence[str], command: Sequence[str] | None) -> bool:
    """Whether the run of this allocation has finished. Raises RequestError."""
    job = load_job(job_file, *overrides, command=command).job
    return _has_finished(run_directory(job, job.name, run_stamp(os.environ)))


def resumed_run_has_finished(run: Path) -> bool:
    """Whether a resumed run has finished. Raises RequestError."""
    return _has_finished(planned_run(run))


def _has_finished(directory: RunDir) -> bool:
    return directory.state().get("state") == "finished"


def _request_stop(directory: RunDir) -> None:
    """Asks the run to save and stop because the time limit is near."""
    if not directory.path.is_dir():
        raise RequestError(
            Problem("the run directory does not exist; the run may not have started", file=str(directory.path))
        )
    directory.request_stop(now=False, time_limit=True)
