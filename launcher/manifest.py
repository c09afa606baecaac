"""A checkpoint's manifest lists every file with its size and checksum.

It is written last: without it a checkpoint is incomplete.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import Any, Unpack

from launcher.files import parse_lines, read_json, sha256_of, utc_now, write_json
from launcher.records import FileRecord, Manifest, ManifestFacts
from launcher.version import __version__

MANIFEST = "manifest.json"
FORMAT = 2
"""Manifests without a format are of earlier versions: their files have a size only."""
_FOLDER = re.compile(r"^update-(\d+)(\.replaced)?$")
_NEEDED: dict[str, type] = {"update": int, "samples": int, "files": dict}
_NEEDED_TO_LOAD: dict[str, type] = {"plan_sha256": str, "world_size": int}
"""Further keys that a resume or an export needs."""
_SHA256 = re.compile(r"^[0-9a-f]{64}$")
_PACKAGES = ("deepspeed", "torch", "transformers")
_THREADS = 4


def write_manifest(
    checkpoint: Path, files: Mapping[str, FileRecord] | None = None, **facts: Unpack[ManifestFacts]
) -> None:
    """Writes the manifest of a finished checkpoint: `facts`, and `files`, by default all files in the folder."""
    if files is None:
        files = file_records(checkpoint, files_in(checkpoint))
    manifest: Manifest = {
        "format": FORMAT,
        "time": utc_now(),
        **facts,
        "versions": _versions(),
        "files": dict(sorted(files.items())),
    }
    write_json(checkpoint / MANIFEST, manifest)
    sync_folder(checkpoint)


def files_in(checkpoint: Path) -> list[str]:
    """The names of all files in a checkpoint's folder except the manifest, relative to the folder.

    A symbolic link counts as a file, also one to a folder.
    """
    found = []
    for folder, folders, files in os.walk(checkpoint):
        links = [name for name in folders if Path(folder, name).is_symlink()]
        found += [Path(folder, name).relative_to(checkpoint).as_posix() for name in (*files, *links)]
    return sorted(name for name in found if name != MANIFEST)


def file_records(checkpoint: Path, names: Iterable[str]) -> dict[str, FileRecord]:
    """Size and checksum of files, by name. The files are on disk afterwards."""
    names = list(names)
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: _record(checkpoint / name), names), strict=True))


def merged_records(of_ranks: Sequence[Mapping[str, FileRecord]]) -> dict[str, FileRecord]:
    """The files of all ranks. Raises ValueError if two ranks list the same file."""
    found: dict[str, FileRecord] = {}
    for rank, files in enumerate(of_ranks):
        if twice := found.keys() & files.keys():
            raise ValueError(f"rank {rank} and a rank before it both wrote {', '.join(sorted(twice))}")
        found.update(files)
    return found


def read_manifest(checkpoint: Path) -> dict[str, Any] | None:
    """The manifest; None if it is missing, cannot be read, or lacks a required key."""
    try:
        manifest = read_json(checkpoint / MANIFEST)
    except OSError:
        return None
    return manifest if manifest is not None and _wrong_key(manifest, _NEEDED) is None else None


def parse_manifest(content: bytes) -> dict[str, Any] | None:
    """The manifest with this content, of format FORMAT; None if a key that a resume needs is missing or wrong."""
    manifest = next(parse_lines([content]), None)
    if manifest is None or "format" not in manifest or _wrong_key(manifest, {**_NEEDED, **_NEEDED_TO_LOAD}):
        return None
    return manifest


def sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checkpoint_number(folder: Path) -> int | None:
    """The update in the name of a checkpoint's folder; None for any other folder."""
    match = _FOLDER.match(folder.name)
    return int(match[1]) if match else None


def checkpoint_is_complete(checkpoint: Path) -> bool:
    """Whether every file in the manifest exists and has its size."""
    manifest = read_manifest(checkpoint)
    return manifest is not None and _wrong_file(checkpoint, manifest) is None


def checkpoint_fault(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be loaded, as text; None if no fault is found.

    It must be complete, and PyTorch's files must start and end like its archives. Their content is not read.
    """
    if not (checkpoint / MANIFEST).exists():
        return f"it has no {MANIFEST}: it was not saved completely"
    try:
        manifest = read_json(checkpoint / MANIFEST)
    except OSError as error:
        return f"{MANIFEST} cannot be read: {error.strerror}"
    if manifest is None:
        return f"{MANIFEST} is not valid JSON"
    if key := _wrong_key(manifest, {**_NEEDED, **_NEEDED_TO_LOAD}):
        return f"{MANIFEST} has no valid {key!r}"
    if checkpoint_number(checkpoint) != manifest["update"]:
        return f"{MANIFEST} belongs to update {manifest['update']}"
    return _wrong_file(checkpoint, manifest) or _wrong_archive(checkpoint, manifest)


def content_fault(folder: Path) -> str | None:
    """Why a checkpoint, or its converted form, cannot be trusted, as text; None if no fault is found.

    Every listed file has its size and checksum, and no other file exists. Reads every file, unless the manifest has no
    format and thus no checksums.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return f"it has no valid {MANIFEST}"
    if other := next((name for name in files_in(folder) if name not in manifest["files"]), None):
        return f"{_shown(other)} is not listed in {MANIFEST}"
    if fault := _wrong_file(folder, manifest):
        return fault
    entries = manifest["files"].items() if "format" in manifest else []
    with ThreadPoolExecutor(_THREADS) as pool:
        faults = pool.map(lambda entry: wrong_checksum(folder, *entry), entries)
        return next((fault for fault in faults if fault), None)


def size_of(checkpoint: Path) -> int:
    """The size in bytes of all listed files; 0 without a valid manifest."""
    manifest = read_manifest(checkpoint)
    return sum(_sizes(manifest).values()) if manifest else 0


def evaluation_loss(checkpoint: Path) -> float | None:
    """The loss of the evaluation at the checkpoint's update; None if it is unknown or not finite."""
    loss = (read_manifest(checkpoint) or {}).get("evaluation_loss")
    return loss if isinstance(loss, float) and math.isfinite(loss) else None


def early_stop(checkpoint: Path) -> str | None:
    """The reason for which early stopping ended the run at the checkpoint's update; None if it did not."""
    reason = (read_manifest(checkpoint) or {}).get("early_stop")
    return reason if isinstance(reason, str) else None


def has_checksums(checkpoint: Path) -> bool:
    """Whether the manifest has checksums; those of earlier versions have none."""
    return "format" in (read_manifest(checkpoint) or {})


def replaced_folder(checkpoint: Path) -> Path:
    """The name of an earlier checkpoint of the same update, until the new one is complete.

    Updates can have the same number after a change of the batch size.
    """
    return checkpoint.with_name(f"{checkpoint.name}.replaced")


def universal_folder(checkpoint: Path) -> Path:
    """The folder of the checkpoint in universal format, which any world size can load."""
    return checkpoint.with_name(f"{checkpoint.name}-universal")


def _wrong_key(manifest: dict[str, Any], kinds: dict[str, type]) -> str | None:
    if manifest.get("format", FORMAT) != FORMAT:
        return "format"
    if wrong := next((key for key, kind in kinds.items() if type(manifest.get(key)) is not kind), None):
        return wrong
    has_checksums = "format" in manifest
    listed = all(_is_entry(name, entry, has_checksums) for name, entry in manifest["files"].items())
    return None if listed else "files"


def _is_entry(name: str, entry: object, has_checksum: bool) -> bool:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        return False
    if not has_checksum:
        return type(entry) is int
    return (
        isinstance(entry, dict)
        and type(entry.get("size")) is int
        and isinstance(entry.get("sha256"), str)
        and _SHA256.match(entry["sha256"]) is not None
    )


def _shown(name: str) -> str:
    """A file's name without control sequences and characters that cannot be printed."""
    return name if name.isprintable() else ascii(name)


def _sizes(manifest: dict[str, Any]) -> dict[str, int]:
    return {name: entry["size"] if isinstance(entry, dict) else entry for name, entry in manifest["files"].items()}


def _record(file: Path) -> FileRecord:
    with file.open("rb") as opened:
        # Otherwise a power failure can leave a complete manifest beside incomplete files.
        os.fsync(opened.fileno())
        return {"size": os.fstat(opened.fileno()).st_size, "sha256": hashlib.file_digest(opened, "sha256").hexdigest()}


def wrong_checksum(folder: Path, name: str, entry: FileRecord) -> str | None:
    """Why the content of a listed file cannot be trusted, as text; None if it has its checksum."""
    try:
        found = sha256_of(folder / name)
    except OSError as error:
        return f"{_shown(name)} cannot be read: {error.strerror}"
    return None if found == entry["sha256"] else f"{_shown(name)} has changed since it was saved: its checksum differs"


@functools.cache
def _versions() -> dict[str, str]:
    found = {"launcher": __version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _wrong_file(checkpoint: Path, manifest: dict[str, Any]) -> str | None:
    for name, size in _sizes(manifest).items():
        try:
            found = (checkpoint / name).stat().st_size
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return f"{_shown(name)} is missing"
        except OSError as error:
            return f"{_shown(name)} cannot be read: {error.strerror}"
        if found != size:
            return f"{_shown(name)} has {found} bytes instead of {size}"
    return None


def _wrong_archive(checkpoint: Path, manifest: dict[str, Any]) -> str | None:
    """torch.save writes zip archives: after a power failure a damaged one usually lacks its start or end."""
    for name in manifest["files"]:
        if not name.endswith(".pt"):
            continue
        try:
            with (checkpoint / name).open("rb") as file:
                good = file.read(2) == b"PK" and zipfile.is_zipfile(file)
        except OSError as error:
            return f"{_shown(name)} cannot be read: {error.strerror}"
        if not good:
            return f"{_shown(name)} is not a PyTorch file"
    return None
