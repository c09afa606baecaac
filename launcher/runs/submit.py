"""Checking a job as far as this machine can, and submitting it to Slurm or to a Ray cluster."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

from rich.console import Console
from rich.text import Text

from launcher.errors import Problem, RequestError
from launcher.files import output_mode
from launcher.job import AnyJob, Job, LoadedJob, ScriptJob, load_job
from launcher.job.load import sets_key
from launcher.job.upload_url import is_url
from launcher.plan.facts import MachineFacts
from launcher.plan.inputs import is_training, plan_inputs
from launcher.plan.resolve import check_inputs
from launcher.prepare.machine import measure_machine
from launcher.prepare.sources import find_data, find_model_folder
from launcher.run_dir import RunDir
from launcher.runs.planning import check_job, lint_ds_config, load_ds_config
from launcher.runs.rest import job_of_rest, planned_run
from launcher.runs.script import check_script


class SubmitTarget(StrEnum):
    """The system to which a job is submitted."""

    slurm = "slurm"
    ray = "ray"


@dataclass(frozen=True)
class Submission:
    """A request to submit a job, or with `resume` a run. `command` is a script from the command line.

    `path` is the job file or the run directory. `print_id` prints only the job id; `echo` prints a line.
    """

    path: Path
    overrides: tuple[str, ...]
    command: tuple[str, ...] = ()
    resume: bool = False
    dry_run: bool = False
    print_id: bool = False
    echo: Callable[[str], None] = print

    def load(self) -> LoadedJob:
        """The job to submit. Raises RequestError."""
        if self.resume and is_url(str(self.path)):
            hint = "launcher resume --download-only URL, then submit the run directory"
            raise RequestError(Problem("--resume takes a run directory, not a URL", hint=hint))
        if self.resume:
            return job_of_rest(planned_run(self.path), self.overrides)
        return load_job(self.path, *self.overrides, command=self.command or None)


def choose_target(job: AnyJob, address: str | None) -> SubmitTarget:
    """Ray if the address of a dashboard is given, else Slurm if the job has a slurm section. Raises RequestError."""
    if address is not None:
        return SubmitTarget.ray
    if "slurm" in job.model_fields_set:
        return SubmitTarget.slurm
    raise RequestError(
        Problem(
            "Slurm or Ray must be chosen: the job has no slurm section, and --address is not given",
            hint="add --to slurm, or --to ray --address http://HEAD:8265",
        )
    )


def with_earlier_signal(submission: Submission, note: Callable[[str], None]) -> tuple[Submission, LoadedJob]:
    """The submission of a run to resume, and its job, with the signal as early as the run needs it to stop.

    Raises RequestError.
    """
    from launcher.slurm.stop_time import describe_late_signal, needed_signal_seconds, read_stop_time

    loaded = submission.load()
    slurm, stop = loaded.job.slurm, read_stop_time(planned_run(submission.path))
    seconds = needed_signal_seconds(slurm, stop)
    if stop is None or seconds == slurm.signal_seconds or sets_key(submission.overrides, "slurm", "signal_seconds"):
        return submission, loaded
    note(f"{describe_late_signal(slurm, stop)}: the next job has slurm.signal_seconds={seconds}")
    submission = replace(submission, overrides=(*submission.overrides, f"slurm.signal_seconds={seconds}"))
    return submission, submission.load()


def to_slurm(submission: Submission, loaded: LoadedJob) -> None:
    """Submits a job to Slurm, or prints what would be submitted. Raises RequestError."""
    from launcher.slurm.options import gpus_per_node
    from launcher.slurm.submit import describe_submission, read_templates, slurm_request, submit_context, submit_request

    messages = Console(stderr=True, highlight=False, soft_wrap=True)
    if submission.resume:
        submission, loaded = with_earlier_signal(submission, lambda text: _note(messages, text))
    with loaded.locate_errors():
        job = loaded.job
        cluster = job.cluster.model_copy(update={"gpus_per_node": gpus_per_node(job)})
        if submission.overrides or not submission.resume:
            _check(replace(loaded, job=job.model_copy(update={"cluster": cluster})))
        if submission.resume:
            job = without_excluded(job, planned_run(submission.path))
        here = submit_context()
        words = [*submission.overrides, *(["--", *submission.command] if submission.command else [])]
        request = slurm_request(
            job, submission.path, words, here, read_templates(job, here.cwd), resume=submission.resume
        )
        if cluster.gpus_per_node and job.slurm.cpus_per_task is None and not job.slurm.exclusive:
            _note(messages, "slurm.cpus_per_task is not set: Slurm uses the default of the site, which may be one core")
        if submission.dry_run:
            messages.print(Text(f"# in {shlex.quote(str(request.cwd))}: {request.command()}", style="dim"))
            print(request.script, end="")
            return
        # Slurm creates the log of the batch job with the umask of sbatch.
        with output_mode(job.output_mode):
            submitted, output = submit_request(request, os.environ)
        if output:
            _note(messages, output)
        submission.echo(str(submitted) if submission.print_id else describe_submission(request, submitted))


def to_ray(submission: Submission, loaded: LoadedJob, address: str | None, *, follow: bool) -> int:
    """Submits a job to a Ray cluster, or prints what would be submitted. Returns the exit status.

    Raises RequestError.
    """
    from launcher.ray_jobs import dashboard_address, ray_request, submit_to_ray

    job = loaded.job
    if submission.resume:
        hint = "ray job submit … -- launcher resume RUN, with the run's absolute path"
        raise RequestError(Problem("--resume works only with Slurm, but the run is submitted to Ray", hint=hint))
    if isinstance(job, ScriptJob):
        words = "exec JOB.YAML -- SCRIPT [ARGUMENT]..." if submission.command else "run JOB.YAML"
        hint = f"ray job submit … -- launcher {words}"
        raise RequestError(Problem("a script works only with Slurm, but the job is submitted to Ray", hint=hint))
    with loaded.locate_errors():
        where = dashboard_address(address, os.environ)
        request = ray_request(job, submission.path.absolute(), submission.overrides, where, Path.cwd())
        _check_uploaded(job)
        _check_for_elsewhere(loaded)
    return submit_to_ray(
        request, submission.echo, dry_run=submission.dry_run, parsable=submission.print_id, follow=follow
    )


def _check(loaded: LoadedJob) -> None:
    """Checks a Slurm job as far as this machine can. Raises RequestError."""
    check_job(loaded)
    job = loaded.job
    if not isinstance(job, ScriptJob):
        return
    check_script(job)
    if job.slurm.array_key:
        found = "this does not work with a script: the index would follow the script's arguments"
        hint = "leave it out, and read SLURM_ARRAY_TASK_ID in the script"
        raise RequestError(Problem(found, key="slurm.array_key", hint=hint))


def without_excluded(job: AnyJob, run: RunDir) -> AnyJob:
    """The job of a resumed run, for which Slurm leaves out the nodes that are excluded from the run."""
    from launcher.slurm.requeue import slurm_names

    if not job.cluster.exclude_after:
        return job
    hosts = [*filter(None, [job.slurm.exclude]), *slurm_names(run.excluded_nodes())]
    return job.model_copy(update={"slurm": job.slurm.model_copy(update={"exclude": ",".join(hosts) or None})})


def _note(messages: Console, text: str) -> None:
    messages.print(Text.assemble(("note: ", "yellow"), text))


def _check_uploaded(job: Job) -> None:
    """Raises RequestError if the model or data are to be uploaded from this folder but are missing."""
    from launcher.ray_jobs import path_in_upload

    here = Path.cwd()
    if path_in_upload(job.model.name_or_path, here):
        find_model_folder(job.model.name_or_path, job.model.gguf_file)
    for key in ("train", "eval"):
        named = getattr(job.data, key)
        names = [named] if isinstance(named, str) else named if isinstance(named, list) else []
        if names and all(path_in_upload(name, here) for name in names):
            find_data(named, f"data.{key}")


def _check_for_elsewhere(loaded: LoadedJob) -> None:
    """Raises RequestError for errors that do not depend on the cluster. Paths on the cluster are not checked."""
    from launcher.ray_jobs import path_in_upload

    job = loaded.job
    if isinstance(job.deepspeed, str) and not path_in_upload(job.deepspeed, Path.cwd()):
        return
    user = load_ds_config(loaded)
    if job.cluster.gpus_per_node == "auto":
        note = "cluster.gpus_per_node is auto: batch sizes are checked on the cluster, which knows the number of ranks"
        _note(Console(stderr=True, highlight=False, soft_wrap=True), note)
        return
    inputs = plan_inputs(job, user, _assumed_node())
    lint_ds_config(inputs)
    if is_training(inputs):
        check_inputs(inputs)


def _assumed_node() -> MachineFacts:
    """An assumed node of a remote cluster, on which all packages and a compiler are installed."""
    here = measure_machine()
    installed = dict.fromkeys(here.versions, "installed")
    return here.model_copy(update={"gpus": 0, "device": "cpu", "versions": installed, "compiler": "c++"})
