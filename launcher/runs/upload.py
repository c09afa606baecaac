"""Uploading a run: in the background of the run that makes it, or afterwards by `launcher upload`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from launcher.errors import LauncherError, Problem, RequestError, RunFailed
from launcher.files import output_mode
from launcher.plan.resume import Start
from launcher.plan.schema import Plan, Script
from launcher.plan_file import read_plan
from launcher.run_dir import RunDir
from launcher.runs.checkpoints import newest_checkpoint, reject_script_run
from launcher.runs.console import RunConsole
from launcher.runs.remote import KEY, Store
from launcher.runs.uploader import Uploader

if TYPE_CHECKING:
    from launcher.runs.interrupts import Interrupts

OnRewind = Callable[[int], None]


@contextmanager
def uploading(
    plan: Plan, directory: RunDir, console: RunConsole, interrupts: Interrupts, start: Start | None = None
) -> Iterator[OnRewind]:
    """Uploads what the run saves inside the block, if the job asks for it. After the block, waits for the last upload.

    `start` is where the run resumes; the block calls what it is given with the samples after which a restart continues.
    A signal ends the waiting. Storage that cannot be reached raises nothing: what is missing is printed.
    """
    section = plan.job.checkpoint
    if section.upload is None or isinstance(plan.workload, Script):
        yield lambda _samples: None
        return
    uploader = Uploader(Store(section.upload), plan, directory, console.note, start)
    uploader.begin()
    try:
        yield uploader.rewound
    except (KeyboardInterrupt, SystemExit):
        uploader.end(0)
        raise
    except BaseException:
        _wait(uploader, section.upload_wait_seconds, interrupts)
        raise
    _wait(uploader, section.upload_wait_seconds, interrupts)


def upload_run(directory: RunDir, plan: Plan, url: str | None, note: Callable[[str], None]) -> None:
    """Uploads what is missing of a run whose lock the caller holds, to `url` or to the job's own.

    Raises RequestError, and RunFailed if something could not be uploaded.
    """
    url = url or plan.job.checkpoint.upload
    if url is None:
        hint = "launcher upload RUN --to s3://BUCKET/PATH"
        raise RequestError(Problem("the run has no checkpoint.upload", file=str(directory.path), key=KEY, hint=hint))
    store = Store(url)
    store.check_writable()
    uploader = Uploader(store, plan, directory, note)
    try:
        with output_mode(plan.job.output_mode):
            uploader.upload_all()
    except LauncherError as error:
        raise RunFailed(f"the upload to {url} failed: {error}") from None
    note(f"uploaded to {url}/{directory.path.name}")


def newest_plan(directory: RunDir) -> Plan:
    """The plan of the run's newest checkpoint, whose rules apply, or its first plan. Raises RequestError."""
    reject_script_run(directory)
    try:
        return newest_checkpoint(directory)[0].plan
    except RequestError:
        return read_plan(directory.plan_file)


def _wait(uploader: Uploader, seconds: float, interrupts: Interrupts) -> None:
    # From now on the first signal ends the waiting; the run itself has ended.
    interrupts.supervisor = None
    try:
        uploader.end(seconds)
    except KeyboardInterrupt:
        uploader.end(0)
