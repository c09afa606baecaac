"""Keeps a copy of a run in cloud storage up to date: its files, finished checkpoints, and the export."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape

from launcher.errors import LauncherError, first_line
from launcher.export_folder import export_fault
from launcher.files import utc_now
from launcher.manifest import FORMAT, MANIFEST, file_records, files_in, wrong_checksum
from launcher.plan.resume import Start
from launcher.plan.schema import Plan
from launcher.records import FileRecord, RunEvent
from launcher.run_dir import RunDir
from launcher.runs.remote import Store, StoreError
from launcher.runs.remote_run import (
    CHECKPOINTS,
    EXPORT,
    Copy,
    due,
    local_copies,
    remote_checkpoints,
    remote_name,
    run_files,
    superfluous,
)

_CANCEL_SECONDS = 5.0


@dataclass(frozen=True)
class Pauses:
    """Seconds between two looks at the run directory, and between attempts: from `first`, doubled, up to `longest`."""

    look: float = 2.0
    first: float = 5.0
    longest: float = 300.0


class _Cancelled(LauncherError):
    """The upload ends now."""


class _GivenUp(LauncherError):
    """A checkpoint is not uploaded: it was removed here, or it is damaged."""


class Uploader:
    """Keeps a copy of one run in cloud storage up to date."""

    def __init__(
        self,
        store: Store,
        plan: Plan,
        directory: RunDir,
        note: Callable[[str], None],
        start: Start | None = None,
        pauses: Pauses = Pauses(),
    ) -> None:
        self._store, self._section, self._run, self._note = store, plan.job.checkpoint, directory, note
        self._pauses = pauses
        self._repeated_after = None if start is None else start.samples
        """The samples after which the run makes its updates again; None if it makes none again."""
        self._name = directory.path.name
        self._thread = threading.Thread(target=self._work, name="upload", daemon=True)
        self._ending, self._cancelled = threading.Event(), threading.Event()
        self._error: str | None = None
        self._pause = pauses.first
        self._there: set[str] = set()
        """Digests of checkpoints that are complete in cloud storage or were given up."""
        self._files: dict[str, str] = {}
        """Digests of the run's small files as uploaded."""
        self._undone: set[str] | None = None
        """Digests of uploaded checkpoints of updates that the run makes again; None if not known yet."""
        self._export: object = None
        self._seen: object = None

    def rewound(self, samples: int) -> None:
        """The run restarts after so many samples. Called in another thread."""
        self._repeated_after, self._undone = samples, None

    def begin(self) -> None:
        """Starts to upload in a thread."""
        self._thread.start()

    def end(self, seconds: float) -> None:
        """Waits up to `seconds` until all is uploaded, ends the thread, and prints what is missing."""
        self._ending.set()
        if seconds and self._thread.is_alive():
            self._thread.join(min(seconds, self._pauses.look))
            if self._thread.is_alive():
                self._note(f"uploading to {escape(self._store.url)} (waiting up to {seconds:.0f} s; Ctrl-C ends this)")
                self._thread.join(max(0.0, seconds - self._pauses.look))
        self._cancelled.set()
        self._thread.join(_CANCEL_SECONDS)
        self._report()

    def upload_all(self) -> None:
        """Uploads all that is missing, in this thread. Raises StoreError."""
        while self._upload_one():
            pass
        self._upload_run_files()

    def _work(self) -> None:
        while not self._cancelled.is_set():
            try:
                ending = self._ending.is_set()
                if self._changed() or ending:
                    self.upload_all()
                self._error, self._pause = None, self._pauses.first
                if ending:
                    return
                self._ending.wait(self._pauses.look)
            except _Cancelled:
                return
            except Exception as error:
                self._failed(error)

    def _changed(self) -> bool:
        """Whether a checkpoint or the export has changed since the last call; True until it was uploaded."""
        stamps = [(path.parent.name, _time(path)) for path in self._run.checkpoints.glob(f"update-*/{MANIFEST}")]
        seen = (sorted(stamps), _time(self._run.export))
        changed = seen != self._seen or self._error is not None
        self._seen = seen
        return changed

    def _failed(self, error: Exception) -> None:
        """Reports the first of several failures, and waits: longer each time, up to the end of the run."""
        reason = first_line(error) if isinstance(error, LauncherError) else f"{type(error).__name__}: {error}"
        if self._error is None:
            self._note(f"          [yellow]note:[/] the upload to {escape(self._store.url)} failed, and is repeated: "
                       f"{escape(reason)}")  # fmt: skip
            self._event({"event": "upload_failed", "url": self._store.url, "reason": reason})
        self._error = reason
        self._files.clear()
        if self._ending.is_set():
            self._cancelled.wait(min(self._pause, self._pauses.first))
        else:
            self._ending.wait(self._pause)
        self._pause = min(2 * self._pause, self._pauses.longest)

    def _upload_one(self) -> bool:
        """Uploads the newest missing checkpoint, or the export. False if nothing is missing."""
        local = local_copies(self._run)
        found = remote_checkpoints(self._store, self._name)
        here = {each.digest for each in local.values()}
        undone_digests = self._undone_digests(found.complete, here)
        undone = {each.folder for each in found.complete if each.digest in undone_digests}
        remote = [each for each in found.complete if each.folder not in undone]
        if any(each.digest in here for each in remote):
            for name in undone:
                self._remove(name)
        self._there |= {each.digest for each in remote}
        missing = [each for each in due(local, remote, self._section) if each.digest not in self._there]
        wanted = {remote_name(each, found.complete): each for each in missing}
        for folder in found.incomplete:
            if folder not in wanted:
                self._remove(folder)
        if not wanted:
            for copy in superfluous(remote, self._section):
                self._remove(copy.folder)
            self._upload_export()
            return False
        folder, copy = next(iter(wanted.items()))
        self._upload_run_files()
        self._upload_checkpoint(copy, folder)
        return True

    def _undone_digests(self, remote: Sequence[Copy], here: set[str]) -> set[str]:
        """The digests of uploaded checkpoints of updates that the run makes again, perhaps under another plan."""
        found, after = self._undone, self._repeated_after
        if found is None:
            # Only once per start: later, the user may remove checkpoints here that are to stay there.
            found = {each.digest for each in remote if after is not None and each.samples > after} - here
            self._undone = found
        return found

    def _upload_checkpoint(self, copy: Copy, folder: str) -> None:
        """Uploads a checkpoint, or gives it up if it is removed here meanwhile, or damaged."""
        local, began = self._run.checkpoints / copy.folder, time.monotonic()
        try:
            content = (local / MANIFEST).read_bytes()
            self._upload_folder(local, copy.files, content, f"{CHECKPOINTS}/{folder}")
        except (_GivenUp, StoreError, FileNotFoundError) as error:
            if isinstance(error, StoreError) and _digest(local) == copy.digest:
                raise
            reason = "it was removed in the run directory"
            if _digest(local) == copy.digest:
                reason = str(error)
                self._note(f"          [yellow]note:[/] {escape(f'{copy.folder} is not uploaded: {reason}')}")
            self._there.add(copy.digest)
            self._event({"event": "upload_given_up", "checkpoint": copy.folder, "reason": reason})
            self._remove(folder)
            return
        self._there.add(copy.digest)
        self._uploaded(copy.folder, copy.files, began)

    def _new_export(self) -> list[tuple[str, int]] | None:
        """The names and times of the export's files if it is complete and differs from the uploaded one, else None."""
        folder = self._run.export
        stamp = [(name, _time(folder / name)) for name in files_in(folder)]
        return None if stamp == self._export or export_fault(folder) is not None else stamp

    def _upload_export(self) -> None:
        """Uploads the export if it is complete and differs from the uploaded one."""
        folder, began, stamp = self._run.export, time.monotonic(), self._new_export()
        if stamp is None:
            return
        files = file_records(folder, files_in(folder))
        content = self._store.read(f"{self._name}/{EXPORT}/{MANIFEST}")
        if content is None or _files_of(content) != files:
            manifest = {"format": FORMAT, "time": utc_now(), "files": files}
            self._upload_folder(folder, files, json.dumps(manifest, indent=2).encode(), EXPORT)
            self._uploaded(EXPORT, files, began)
        self._export = stamp

    def _upload_folder(self, local: Path, files: Mapping[str, Mapping[str, Any]], manifest: bytes, folder: str) -> None:
        """Uploads the files of a folder that are not there yet, and then its manifest.

        Raises _GivenUp if the folder changes meanwhile or a file is damaged, and _Cancelled.
        """
        target = f"{self._name}/{folder}"
        self._store.discard_parts(target)
        present = self._store.sizes(target)
        self._store.remove(
            [f"{target}/{name}" for name in (MANIFEST, *present) if name in present.keys() - files.keys()]
        )

        def check() -> None:
            if self._cancelled.is_set():
                raise _Cancelled
            if folder != EXPORT and (local / MANIFEST).read_bytes() != manifest:
                raise _GivenUp("it was replaced in the run directory")

        for name, entry in files.items():
            check()
            there = present.get(name) == entry["size"]
            if there and self._store.checksum(f"{target}/{name}") == entry["sha256"]:
                continue
            record: FileRecord = {"size": entry["size"], "sha256": entry["sha256"]}
            if fault := wrong_checksum(local, name, record):
                check()
                raise _GivenUp(fault)
            self._store.put(local / name, f"{target}/{name}", entry["sha256"], check)
        check()
        self._store.write(f"{target}/{MANIFEST}", manifest)

    def _upload_run_files(self) -> None:
        """Uploads the small files of the run that have changed."""
        for path in run_files(self._run.path):
            try:
                content = path.read_bytes()
            except FileNotFoundError:
                continue
            digest = hashlib.sha256(content).hexdigest()
            if self._files.get(path.name) != digest:
                self._store.write(f"{self._name}/{path.name}", content)
                self._files[path.name] = digest

    def _remove(self, folder: str) -> None:
        """Removes a checkpoint in cloud storage, the manifest first: without it a checkpoint is incomplete."""
        target = f"{self._name}/{CHECKPOINTS}/{folder}"
        names = sorted(self._store.sizes(target), key=lambda name: name != MANIFEST)
        self._store.remove(f"{target}/{name}" for name in names)
        self._store.discard_parts(target)

    def _uploaded(self, what: str, files: Mapping[str, Mapping[str, Any]], began: float) -> None:
        size = sum(entry["size"] for entry in files.values())
        seconds = round(time.monotonic() - began, 3)
        self._event({"event": "uploaded", "what": what, "url": self._store.url, "bytes": size, "seconds": seconds})

    def _event(self, event: RunEvent) -> None:
        # A full disk must not end the upload.
        with suppress(OSError):
            self._run.event(event)

    def _missing(self) -> list[str]:
        """What is not uploaded, by name."""
        local = local_copies(self._run)
        found = [each.folder for each in due(local, [], self._section) if each.digest not in self._there]
        return [*reversed(found), *([] if self._new_export() is None else [EXPORT])]

    def _report(self) -> None:
        url, missing = escape(f"{self._store.url}/{self._name}"), self._missing()
        if not missing and not self._thread.is_alive() and self._error is None:
            self._note(f"  uploaded to      {url}")
            return
        what = ", ".join(missing) or "the last lines of the run's files"
        reason = f" ({escape(self._error)})" if self._error else ""
        self._note(f"  [yellow]not uploaded[/]     {what}{reason}")
        self._note(f"  upload it with   launcher upload {escape(str(self._run.path))}, or resume the run")


def _digest(checkpoint: Path) -> str | None:
    """The digest of a local checkpoint; None if it was removed."""
    try:
        return hashlib.sha256((checkpoint / MANIFEST).read_bytes()).hexdigest()
    except OSError:
        return None


def _files_of(manifest: bytes) -> object:
    with suppress(ValueError, RecursionError):
        found = json.loads(manifest)
        return found.get("files") if isinstance(found, dict) else None
    return None


def _time(path: Path) -> int:
    """The time of a file's last change in nanoseconds; 0 if it does not exist."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0
