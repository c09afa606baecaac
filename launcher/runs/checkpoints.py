"""A run's checkpoints: verified before they are loaded, each with the plan under which it was saved."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from rich.console import Group
from rich.table import Table
from rich.text import Text

from launcher.errors import Problem, RequestError
from launcher.job.kept_checkpoints import best_first
from launcher.manifest import (
    MANIFEST,
    checkpoint_fault,
    checkpoint_number,
    content_fault,
    early_stop,
    evaluation_loss,
    files_in,
    has_checksums,
    read_manifest,
    size_of,
    universal_folder,
)
from launcher.plan.schema import Plan, Script, hash_in
from launcher.plan_file import read_plan
from launcher.run_dir import DamagedCheckpoint, RunDir
from launcher.watch.number_format import number

OnNote = Callable[[str], None]
CheckpointState = Literal["complete", "verified", "incomplete", "damaged", "set aside"]
_STYLES = {"verified": "green", "damaged": "red", "incomplete": "yellow", "set aside": "dim"}
_SET_ASIDE = re.compile(r"^update-(\d+)\.damaged-\d+$")
_LARGE_BYTES = 10**9
"""Verifying more than this takes seconds, and is reported."""


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint that can be loaded, and the plan under which it was saved.

    `early_stop` is the reason for which early stopping ended the run at this checkpoint, if it did.
    """

    folder: Path
    update: int
    samples: int
    world_size: int
    plan: Plan
    plan_file: Path
    early_stop: str | None = None


@dataclass(frozen=True)
class ListedCheckpoint:
    """A checkpoint in a list; None is what its manifest does not contain. `reason` explains the state."""

    name: str
    path: str
    update: int
    samples: int | None
    ranks: int | None
    evaluation_loss: float | None
    bytes: int
    time: str | None
    state: CheckpointState
    reason: str | None = None


def list_checkpoints(directory: RunDir, note: OnNote | None = None) -> list[ListedCheckpoint]:
    """All checkpoints, oldest first. With `note`, the content of complete ones is verified; see `newest_verified`.

    Raises RequestError for a script's run.
    """
    reject_script_run(directory)
    found = [_listed(path, note) for path in directory.checkpoints.glob("update-*") if path.is_dir()]
    known = [each for each in found if each is not None]
    return sorted(known, key=lambda each: (each.samples is None, each.samples, each.update, each.name))


def checkpoints_json(found: Sequence[ListedCheckpoint]) -> str:
    """The list as JSON objects."""
    return json.dumps([asdict(each) for each in found], indent=2)


def checkpoints_view(found: Sequence[ListedCheckpoint]) -> Group | Text:
    """The list as a table, with the reasons below it."""
    if not found:
        return Text("no checkpoints")
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("checkpoint", no_wrap=True)
    for column in ("samples", "ranks", "eval loss", "GB"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("saved", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for each in found:
        counts = ("-" if count is None else str(count) for count in (each.samples, each.ranks))
        state = Text(each.state, style=_STYLES.get(each.state, ""))
        loss = number(each.evaluation_loss)
        table.add_row(each.name, *counts, loss, f"{each.bytes / 1e9:.2f}", each.time or "-", state)
    return Group(table, *(Text(f"{each.name}: {each.reason}") for each in found if each.reason))


def newest_checkpoint(directory: RunDir) -> tuple[SavedCheckpoint, list[DamagedCheckpoint]]:
    """The newest checkpoint by the sizes of its files, and newer ones that are damaged.

    It must be verified before it is loaded: see `newest_verified`. Raises RequestError if no checkpoint can be loaded,
    and for a script's run: scripts manage their own checkpoints.
    """
    return _newest(directory, lambda _: None)


def newest_verified(directory: RunDir, note: OnNote) -> tuple[SavedCheckpoint, list[DamagedCheckpoint]]:
    """The newest checkpoint whose files have their checksums, and newer ones that are damaged.

    `note` is called with a line before a large checkpoint is read. Raises as `newest_checkpoint` does.
    """
    return _newest(directory, lambda folder: _content_fault(folder, note))


def best_verified(directory: RunDir, note: OnNote) -> SavedCheckpoint | None:
    """The checkpoint with the lowest evaluation loss whose files have their checksums; None if no loss is known.

    `note` is called with a line for each better one that is damaged. Raises RequestError for a script's run.
    """
    reject_script_run(directory)
    folders = {update: directory.saved_checkpoint(update) for update in directory.usable_checkpoints()}
    for update in best_first({update: evaluation_loss(folder) for update, folder in folders.items()}):
        fault = _content_fault(folders[update], note)
        if fault is None:
            return _saved(directory, folders[update])
        note(str(DamagedCheckpoint(folders[update], fault)))
    return None


def checkpoint_at(directory: RunDir, update: int, note: OnNote = lambda _: None) -> SavedCheckpoint:
    """The verified checkpoint of an update.

    Raises RequestError, which lists the usable updates, if it cannot be loaded.
    """
    reject_script_run(directory)
    folder = directory.saved_checkpoint(update)
    fault = (checkpoint_fault(folder) or _content_fault(folder, note)) if folder.is_dir() else "it does not exist"
    if fault:
        usable = ", ".join(str(each) for each in directory.usable_checkpoints() if each != update)
        hint = f"usable checkpoints are those of updates: {usable}" if usable else "this run has no usable checkpoint"
        raise RequestError(Problem(str(DamagedCheckpoint(folder, fault)), file=str(directory.path), hint=hint))
    return _saved(directory, folder)


def set_aside(directory: RunDir, damaged: DamagedCheckpoint, used: SavedCheckpoint) -> Path | None:
    """Renames a damaged checkpoint to <name>.damaged-<k> and records the event. The caller holds the run's lock.

    Returns its new path, or None if it is not renamed: the next save of this update removes an incomplete one.
    """
    renamed: Path | None = None
    with suppress(OSError):
        if (damaged.path / MANIFEST).exists():
            renamed = _rename_aside(damaged.path)
    directory.event(
        {
            "event": "checkpoint_damaged",
            "checkpoint": damaged.path.name,
            "reason": damaged.reason,
            "used": used.folder.name,
            "renamed_to": renamed.name if renamed else None,
        }
    )
    return renamed


def set_aside_if_idle(directory: RunDir, damaged: DamagedCheckpoint, used: SavedCheckpoint) -> Path | None:
    """As `set_aside`, for a caller that does not hold the lock: does nothing while a launcher runs in the directory."""
    with suppress(OSError), directory.held() as held:
        # Since it was read, a launcher may have saved it again.
        if held and (checkpoint_fault(damaged.path) or content_fault(damaged.path)):
            return set_aside(directory, damaged, used)
    return None


def reject_script_run(directory: RunDir) -> None:
    """Raises RequestError if the run is that of a user's script."""
    workload = read_plan(directory.plan_file).workload
    if isinstance(workload, Script):
        raise RequestError(
            Problem(
                f"this is a run of the script {' '.join(workload.arguments[:2])}, which manages its own checkpoints",
                file=str(directory.path),
                hint="start it again with launcher exec, with the script's own option for resuming",
            )
        )


def _listed(folder: Path, note: OnNote | None) -> ListedCheckpoint | None:
    """The folder as an entry of the list; None if it is not a checkpoint, or was removed in the meantime."""
    aside = _SET_ASIDE.match(folder.name)
    update = int(aside[1]) if aside else checkpoint_number(folder)
    if update is None:
        return None
    state, reason = ("set aside", None) if aside else _state(folder, note)
    manifest = read_manifest(folder) or {}
    size = size_of(folder) if state in ("complete", "verified") else _bytes_in(folder)
    if not folder.is_dir():
        return None
    samples, ranks, time = manifest.get("samples"), manifest.get("world_size"), manifest.get("time")
    return ListedCheckpoint(
        name=folder.name,
        path=str(folder),
        update=update,
        samples=samples,
        ranks=ranks if isinstance(ranks, int) else None,
        evaluation_loss=evaluation_loss(folder),
        bytes=size,
        time=time if isinstance(time, str) and time.isprintable() else None,
        state=state,
        reason=reason,
    )


def _state(folder: Path, note: OnNote | None) -> tuple[CheckpointState, str | None]:
    fault = checkpoint_fault(folder)
    if fault:
        return ("damaged" if (folder / MANIFEST).exists() else "incomplete"), fault
    if note is None:
        return "complete", None
    if fault := _content_fault(folder, note):
        return "damaged", fault
    return ("verified", None) if has_checksums(folder) else ("complete", f"its {MANIFEST} has no checksums")


def _bytes_in(folder: Path) -> int:
    total = 0
    for name in files_in(folder):
        with suppress(OSError):
            total += (folder / name).lstat().st_size
    return total


def _newest(
    directory: RunDir, fault_in: Callable[[Path], str | None]
) -> tuple[SavedCheckpoint, list[DamagedCheckpoint]]:
    reject_script_run(directory)
    damaged = directory.damaged_checkpoints()
    for update in reversed(directory.usable_checkpoints()):
        folder = directory.saved_checkpoint(update)
        if fault := fault_in(folder):
            damaged.append(DamagedCheckpoint(folder, fault))
            continue
        saved = _saved(directory, folder)
        return saved, [each for each in damaged if _is_newer(each.path, saved)]
    listed = "".join(f"\n    {each}" for each in damaged)
    raise RequestError(Problem(f"no complete checkpoint found{listed}", file=str(directory.checkpoints)))


def _content_fault(folder: Path, note: OnNote) -> str | None:
    if (size := size_of(folder)) >= _LARGE_BYTES:
        note(f"verifying {folder.name} ({size / 1e9:.1f} GB)")
    return content_fault(folder)


def _rename_aside(checkpoint: Path) -> Path:
    """Renames a checkpoint, and its converted form, to the first free name. Returns the new path of the checkpoint."""
    k = 1
    while (renamed := checkpoint.with_name(f"{checkpoint.name}.damaged-{k}")).exists():
        k += 1
    checkpoint.rename(renamed)
    universal = universal_folder(checkpoint)
    if universal.exists():
        universal.rename(universal.with_name(f"{universal.name}.damaged-{k}"))
    return renamed


def _is_newer(damaged: Path, saved: SavedCheckpoint) -> bool:
    """Compares samples if they can be read: after a change of batch size, update numbers are not comparable."""
    samples = (read_manifest(damaged) or {}).get("samples")
    return (checkpoint_number(damaged) or 0) > saved.update if samples is None else samples > saved.samples


def _saved(directory: RunDir, folder: Path) -> SavedCheckpoint:
    manifest = read_manifest(folder)
    assert manifest is not None
    update, samples, world_size = (manifest[key] for key in ("update", "samples", "world_size"))
    for file in (directory.plan_file, *directory.plan_revisions()):
        plan = read_plan(file)
        if manifest["plan_sha256"] in (plan.sha256, hash_in(file.read_text())):
            return SavedCheckpoint(folder, update, samples, world_size, plan, file, early_stop(folder))
    found = f"the plan {manifest['plan_sha256'][:12]}… of {folder.name} is missing"
    raise RequestError(Problem(found, file=str(directory.path)))
