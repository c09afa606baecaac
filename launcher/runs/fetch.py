"""Lists the checkpoints of a run in cloud storage, and downloads it with the newest one that is verified."""

from __future__ import annotations

import shutil
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path

from launcher.errors import Problem, RequestError, RunFailed
from launcher.files import output_mode
from launcher.job.upload_url import InvalidUrl, checked_url
from launcher.job.user_path import user_path
from launcher.manifest import MANIFEST, checkpoint_fault, checkpoint_number, content_fault
from launcher.plan.schema import Plan
from launcher.plan_file import read_plan
from launcher.run_dir import RunDir
from launcher.runs.checkpoints import ListedCheckpoint
from launcher.runs.remote import Store, StoreError
from launcher.runs.remote_run import CHECKPOINTS, Copy, is_run_file, remote_checkpoints

OnNote = Callable[[str], None]


def remote_run(url: str) -> tuple[Store, str]:
    """The storage that contains the run at a URL, and the run's name. Raises RequestError if no run is there."""
    try:
        parent, _, name = checked_url(url).rpartition("/")
    except InvalidUrl as error:
        raise RequestError(Problem(f"the URL {error.reason}", key="RUN", hint=error.hint)) from None
    if parent.endswith(("/", ":")):
        raise RequestError(Problem(f"{url}: the name of the run is missing", key="RUN", hint=_HINT))
    store = Store(parent)
    try:
        if store.read(f"{name}/plan.json") is None:
            runs = ", ".join(store.folders()[-5:])
            hint = f"found in {parent}: {runs}" if runs else _HINT
            raise RequestError(Problem(f"{url}: no run was found", key="RUN", hint=hint))
    except StoreError as error:
        raise RequestError(Problem(f"{url} cannot be read: {error}", key="RUN")) from None
    return store, name


def list_remote_checkpoints(url: str) -> list[ListedCheckpoint]:
    """The checkpoints of a run in cloud storage, oldest first; only names, sizes and manifests are read.

    Raises RequestError if the URL is not that of a run, and RunFailed if it cannot be read.
    """
    store, name = remote_run(url)
    base = f"{url.rstrip('/')}/{CHECKPOINTS}"
    try:
        found = remote_checkpoints(store, name)
        sizes = {
            folder: store.sizes(f"{name}/{CHECKPOINTS}/{folder}") for folder in (*found.incomplete, *found.unusable)
        }
    except StoreError as error:
        raise RunFailed(f"{url} cannot be read: {error}") from None
    incomplete = [
        ListedCheckpoint(
            folder, f"{base}/{folder}", number, None, None, None, sum(files.values()), None, "incomplete", _INCOMPLETE
        )
        for folder, files in sizes.items()
        if (number := checkpoint_number(Path(folder.partition(".")[0]))) is not None
    ]
    complete = [
        ListedCheckpoint(
            each.folder,
            f"{base}/{each.folder}",
            each.update,
            each.samples,
            each.ranks,
            each.loss,
            each.bytes,
            each.time or None,
            "complete",
        )
        for each in found.complete
    ]
    return [*complete, *incomplete]


def fetch_run(url: str, to: Path | None, note: OnNote) -> RunDir:
    """Downloads a run to `to`/NAME, by default to the job's output_dir.

    Its newest checkpoint is downloaded and verified; if it is damaged, the one before it. Raises RequestError if the
    URL is not that of a run, or the run directory exists already, and RunFailed if the download fails.
    """
    store, name = remote_run(url)
    job = _plan(store, name).job
    parent = user_path(job.output_dir, "output_dir") if to is None else user_path(to, "--to")
    target = parent / name
    if target.exists():
        hint = f"launcher resume {target} resumes it; --to DIR downloads to another folder"
        raise RequestError(Problem("this run directory exists already", file=str(target), hint=hint))
    temporary = parent / f".{name}.{uuid.uuid4().hex[:8]}.download"
    try:
        with output_mode(job.output_mode):
            temporary.mkdir(parents=True)
            _download(store, name, temporary, note)
        temporary.rename(target)
    except StoreError as error:
        raise RunFailed(f"the download of {url} failed: {error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return RunDir(target.resolve())


_INCOMPLETE = "files or a valid manifest.json are missing: it is being uploaded, or the upload was interrupted"
_HINT = "give checkpoint.upload, a slash and the name of the run: s3://BUCKET/PATH/RUN"


def _plan(store: Store, name: str) -> Plan:
    """The plan of a run. Raises RequestError."""
    with tempfile.TemporaryDirectory() as folder:
        plan_file = Path(folder) / "plan.json"
        store.get(f"{name}/plan.json", plan_file)
        return read_plan(plan_file)


def _download(store: Store, name: str, folder: Path, note: OnNote) -> None:
    for file in store.sizes(name):
        if is_run_file(file):
            store.get(f"{name}/{file}", folder / file)
    run = RunDir(folder)
    run.logs.mkdir()
    run.checkpoints.mkdir()
    found = remote_checkpoints(store, name).complete
    for copy in reversed(found):
        fault = _download_checkpoint(store, name, copy, run, note)
        if fault is None:
            return
        note(f"{copy.folder} cannot be used: {fault}")
    url = f"{store.url}/{name}"
    raise RequestError(Problem(f"{url}: no complete checkpoint found", key="RUN", hint="start a new run"))


def _download_checkpoint(store: Store, name: str, copy: Copy, run: RunDir, note: OnNote) -> str | None:
    """Downloads a checkpoint. Returns why it cannot be used, and removes it then; None if it is verified."""
    note(f"downloading {copy.folder} ({copy.bytes / 1e9:.2f} GB)")
    folder, source = run.checkpoint(copy.update), f"{name}/{CHECKPOINTS}/{copy.folder}"
    for file in (*copy.files, MANIFEST):
        store.get(f"{source}/{file}", folder / file)
    fault = checkpoint_fault(folder) or content_fault(folder)
    if fault is not None:
        shutil.rmtree(folder)
    return fault
