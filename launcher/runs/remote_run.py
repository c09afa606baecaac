"""A run in cloud storage: its files, its checkpoints, and which of them to upload and to remove."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.job.kept_checkpoints import removable
from launcher.job.schema import CheckpointSection
from launcher.manifest import MANIFEST, parse_manifest
from launcher.run_dir import RunDir
from launcher.runs.remote import Store

CHECKPOINTS, EXPORT = "checkpoints", "export"
_CHECKPOINT = re.compile(r"^update-\d+(\.[a-z0-9.]+)?$")
RUN_FILES = (
    *("job.yaml", "plan.json", "plan.revision-*.json", "ds_config.json", "state.json"),
    *("events.jsonl", "metrics.jsonl", "metrics.undone-*.jsonl", "evaluations.jsonl", "evaluations.undone-*.jsonl"),
)
"""Patterns of the files of a run directory that are uploaded beside checkpoints and export."""


@dataclass(frozen=True)
class Copy:
    """A complete checkpoint, here or in cloud storage. Two copies of one checkpoint have the same `digest`.

    `files` has the size and the checksum of each file.
    """

    folder: str
    update: int
    samples: int
    ranks: int
    loss: float | None
    digest: str
    time: str
    files: Mapping[str, Mapping[str, Any]]

    @property
    def bytes(self) -> int:
        """The size of all files."""
        return sum(entry["size"] for entry in self.files.values())


@dataclass(frozen=True)
class Found:
    """The checkpoints of a run in cloud storage: the complete ones, oldest first, and the names of the others.

    Those without a manifest are `incomplete`; `unusable` ones have one that does not match, or is of a later version.
    """

    complete: tuple[Copy, ...]
    incomplete: tuple[str, ...]
    unusable: tuple[str, ...]


def copy_in(folder: str, manifest: bytes) -> Copy | None:
    """The checkpoint in a folder by its manifest; None if the manifest is not valid or has no checksums."""
    found = parse_manifest(manifest)
    if found is None:
        return None
    loss, time = found.get("evaluation_loss"), found.get("time")
    return Copy(
        folder=folder,
        update=found["update"],
        samples=found["samples"],
        ranks=found["world_size"],
        loss=loss if isinstance(loss, float) and math.isfinite(loss) else None,
        digest=hashlib.sha256(manifest).hexdigest(),
        time=time if isinstance(time, str) and time.isprintable() else "",
        files=found["files"],
    )


def local_copies(run: RunDir) -> dict[int, Copy]:
    """The usable checkpoints of a run directory by update, oldest first. One that is just removed is left out."""
    found = {}
    for update in run.usable_checkpoints():
        folder = run.saved_checkpoint(update)
        try:
            copy = copy_in(folder.name, (folder / MANIFEST).read_bytes())
        except OSError:
            continue
        if copy is not None:
            found[update] = copy
    return found


def remote_checkpoints(store: Store, run: str) -> Found:
    """The checkpoints of a run in cloud storage. One is complete if all files in its manifest have their sizes."""
    sizes: dict[str, dict[str, int]] = {}
    for name, size in store.sizes(f"{run}/{CHECKPOINTS}").items():
        folder, _, file = name.partition("/")
        sizes.setdefault(folder, {})[file] = size
    complete, incomplete, unusable = [], [], []
    for folder, files in sizes.items():
        if _CHECKPOINT.match(folder) is None:
            continue
        if MANIFEST not in files:
            incomplete.append(folder)
            continue
        content = store.read(f"{run}/{CHECKPOINTS}/{folder}/{MANIFEST}")
        copy = copy_in(folder, content) if content is not None else None
        if copy and all(files.get(name) == entry["size"] for name, entry in copy.files.items()):
            complete.append(copy)
        else:
            unusable.append(folder)
    return Found(
        tuple(sorted(complete, key=lambda each: (each.samples, each.time))), tuple(incomplete), tuple(unusable)
    )


def remote_name(local: Copy, remote: Sequence[Copy]) -> str:
    """The folder to which a checkpoint is uploaded: its own name, unless a complete different one has that name.

    A checkpoint is never overwritten before its successor is complete, and the name is the same after an interruption.
    """
    taken = any(each.folder == local.folder and each.digest != local.digest for each in remote)
    return f"{local.folder}.{local.digest[:8]}" if taken else local.folder


def due(local: Mapping[int, Copy], remote: Sequence[Copy], section: CheckpointSection) -> list[Copy]:
    """The local checkpoints to upload, the newest first: those that the rule of the job keeps and that are missing."""
    there = {each.digest for each in remote}
    losses = _losses([*remote, *local.values()])
    gone = set(removable(losses, section))
    return [each for each in reversed(list(local.values())) if each.digest not in there and each.update not in gone]


def superfluous(remote: Sequence[Copy], section: CheckpointSection) -> list[Copy]:
    """The remote checkpoints to remove: those that no rule of the job keeps, and earlier ones of the same update."""
    newest = {each.update: each for each in remote}
    gone = set(removable(_losses(remote), section))
    return [each for each in remote if each is not newest[each.update] or each.update in gone]


def _losses(copies: Sequence[Copy]) -> dict[int, float | None]:
    """The evaluation loss of each update, in order of samples. Of copies of the same update, the last one counts."""
    last = {each.update: each for each in copies}
    return {each.update: each.loss for each in sorted(last.values(), key=lambda each: (each.samples, each.update))}


def run_files(run: Path) -> list[Path]:
    """The existing files of RUN_FILES."""
    return sorted(path for pattern in RUN_FILES for path in run.glob(pattern) if path.is_file())


def is_run_file(name: str) -> bool:
    """Whether a name is one of RUN_FILES."""
    path = Path(name)
    return len(path.parts) == 1 and any(path.match(pattern) for pattern in RUN_FILES)
