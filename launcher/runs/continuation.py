"""Continuing a run in another Slurm job when the time limit of this one has stopped it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from rich.markup import escape

from launcher.errors import LauncherError, Problem, RequestError, first_line
from launcher.files import utc_now, write_json
from launcher.job import AnyJob
from launcher.records import ContinuationRecord
from launcher.run_dir import RunDir
from launcher.runs.console import RunConsole
from launcher.runs.interrupts import WARNINGS, Interrupts
from launcher.runs.submit import Submission, with_earlier_signal, without_excluded
from launcher.slurm.continuation import DEVICES, continuing, job_number, read_continuation, why_not_continued
from launcher.slurm.queue import cancel_slurm_job, ends_by_time_limit
from launcher.slurm.submit import SlurmRequest, read_templates, slurm_request, submit_context, submit_request


@dataclass(frozen=True)
class Continuation:
    """Submits the next job of a run. `environment` is that of the task before its Ray started.

    `begun` is the update at which the run started in this job.
    """

    directory: RunDir
    console: RunConsole
    job_id: str
    nodes: int
    environment: Mapping[str, str]
    begun: int
    max_jobs: int

    def __call__(self, interrupts: Interrupts) -> None:
        """Call this when the run was stopped: submits the next job if the time limit was the cause. Raises nothing."""
        if not self._is_wanted(interrupts):
            return
        try:
            self._submit()
        except (LauncherError, OSError) as error:
            self._refuse(first_line(error))

    def _is_wanted(self, interrupts: Interrupts) -> bool:
        if self._cancelled():
            return False
        if interrupts.asked:
            # Slurm sends SIGTERM at the time limit, but also for scancel and a preemption.
            return ends_by_time_limit(self.job_id)
        return interrupts.signal in WARNINGS

    def _cancelled(self) -> bool:
        request = self.directory.stop_request()
        return request is not None and not request.get("time_limit")

    def _submit(self) -> None:
        last = read_continuation(self.directory)
        saved = newest_update(self.directory)
        if reason := why_not_continued(last, self.job_id, self.begun, saved, self.max_jobs):
            self._refuse(reason)
            return
        submission, loaded = with_earlier_signal(Submission(self.directory.path, (), resume=True), self._note)
        job = continuing(without_excluded(loaded.job, self.directory), self.job_id, self.nodes)
        request = _request(job, submission, self.environment)
        number = job_number(last, self.job_id) + 1
        # Written before the job is submitted: a job that cannot be recorded must not be submitted.
        self._record(None, number, saved)
        environment = {name: value for name, value in self.environment.items() if name not in DEVICES}
        submitted, output = submit_request(request, environment)
        if output:
            self._note(output)
        try:
            self._record(submitted.id, number, saved)
        except OSError:
            cancel_slurm_job(submitted.id)
            raise
        if self._cancelled():
            cancel_slurm_job(submitted.id)
            return
        self.console.note(f"  Slurm job {submitted.id} continues the run (job {number} of at most {self.max_jobs})")
        with suppress(OSError):
            self.directory.event(
                {
                    "event": "continued",
                    "job": submitted.id,
                    "continues": self.job_id,
                    "number": number,
                    "update": saved,
                }
            )

    def _record(self, job: str | None, number: int, update: int) -> None:
        record: ContinuationRecord = {
            "time": utc_now(),
            "job": job,
            "continues": self.job_id,
            "number": number,
            "update": update,
        }
        write_json(self.directory.continuation_file, record)

    def _refuse(self, reason: str) -> None:
        self.console.note(f"  no other job continues the run: {escape(reason)}")
        with suppress(OSError):
            self.directory.event({"event": "not_continued", "reason": reason})

    def _note(self, text: str) -> None:
        self.console.note(f"  [yellow]note:[/] {escape(text)}")


def newest_update(directory: RunDir) -> int:
    """The update of the newest complete checkpoint; 0 without one."""
    return next(reversed(directory.complete_checkpoints()), 0)


def check_resubmit(job: AnyJob) -> None:
    """Raises RequestError if the job asks for continuations that could not be submitted from this node."""
    if not job.slurm.resubmit:
        return
    if shutil.which("sbatch") is None:
        hint = "the node that runs the job submits the next one: install Slurm's commands there, or in the container"
        raise RequestError(Problem("sbatch is not installed on this node", key="slurm.resubmit", hint=hint))
    _request(job, Submission(Path("run"), (), resume=True), {})


def _request(job: AnyJob, submission: Submission, environment: Mapping[str, str]) -> SlurmRequest:
    here = replace(submit_context(), variables=tuple(environment))
    return slurm_request(job, submission.path, submission.overrides, here, read_templates(job, here.cwd), resume=True)
