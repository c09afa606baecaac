"""A checkpoint's manifest lists every file with its size. It is written last: without it a checkpoint is incomplete."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any, Unpack

from launcher.files import read_json, utc_now, write_json
from launcher.records import Manifest, ManifestFacts

MANIFEST = "manifest.json"
_FOLDER = re.compile(r"^update-(\d+)$")
_NEEDED: dict[str, type] = {"update": int, "samples": int, "files": dict}
_NEEDED_TO_LOAD: dict[str, type] = {"plan_sha256": str, "world_size": int}
"""Further keys that a resume or an export needs."""


def write_manifest(checkpoint: Path, **facts: Unpack[ManifestFacts]) -> None:
    """Writes the manifest of a finished checkpoint: `facts`, and every file with its size."""
    files = {str(p.relative_to(checkpoint)): p.stat().st_size for p in sorted(checkpoint.rglob("*")) if p.is_file()}
    manifest: Manifest = {"time": utc_now(), **facts, "files": files}
    write_json(checkpoint / MANIFEST, manifest)


def read_manifest(checkpoint: Path) -> dict[str, Any] | None:
    """The manifest; None if it is missing, cannot be read, or lacks a required key."""
    try:
        manifest = read_json(checkpoint / MANIFEST)
    except OSError:
        return None
    return manifest if manifest is not None and _wrong_key(manifest, _NEEDED) is None else None


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


def universal_folder(checkpoint: Path) -> Path:
    """The folder of the checkpoint in universal format, which any world size can load."""
    return checkpoint.with_name(f"{checkpoint.name}-universal")


def _wrong_key(manifest: dict[str, Any], kinds: dict[str, type]) -> str | None:
    wrong = (key for key, kind in kinds.items() if type(manifest.get(key)) is not kind)
    return next(wrong, None)


def _wrong_file(checkpoint: Path, manifest: dict[str, Any]) -> str | None:
    for name, size in manifest["files"].items():
        try:
            found = (checkpoint / name).stat().st_size
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        if found != size:
            return f"{name} has {found} bytes instead of {size}"
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
            return f"{name} cannot be read: {error.strerror}"
        if not good:
            return f"{name} is not a PyTorch file"
    return None
