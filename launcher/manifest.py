"""A checkpoint's manifest: written last, it names every file with its size, and makes the folder a checkpoint."""

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
_NAMED: dict[str, type] = {"plan_sha256": str, "world_size": int}
"""What a resume or an export needs besides."""


def write_manifest(checkpoint: Path, **facts: Unpack[ManifestFacts]) -> None:
    """Names every file of a finished checkpoint with its size."""
    files = {str(p.relative_to(checkpoint)): p.stat().st_size for p in sorted(checkpoint.rglob("*")) if p.is_file()}
    manifest: Manifest = {"time": utc_now(), **facts, "files": files}
    write_json(checkpoint / MANIFEST, manifest)


def read_manifest(checkpoint: Path) -> dict[str, Any] | None:
    """The manifest; None if it is missing, cannot be read, or lacks what makes it one."""
    try:
        manifest = read_json(checkpoint / MANIFEST)
    except OSError:
        return None
    return manifest if manifest is not None and _wrong_key(manifest, _NEEDED) is None else None


def checkpoint_number(folder: Path) -> int | None:
    """The update in the name of a checkpoint's folder; None of another folder."""
    match = _FOLDER.match(folder.name)
    return int(match[1]) if match else None


def checkpoint_is_complete(checkpoint: Path) -> bool:
    """Whether every file that the manifest names is there with its size."""
    manifest = read_manifest(checkpoint)
    return manifest is not None and _wrong_file(checkpoint, manifest) is None


def checkpoint_fault(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be loaded, in words; None if nothing is found.

    Besides what makes it complete, PyTorch's files must begin and end as its archives do. Their content is not read.
    """
    if not (checkpoint / MANIFEST).exists():
        return f"it has no {MANIFEST}: saving it was not finished"
    try:
        manifest = read_json(checkpoint / MANIFEST)
    except OSError as error:
        return f"{MANIFEST} cannot be read: {error.strerror}"
    if manifest is None:
        return f"{MANIFEST} is not readable JSON"
    if key := _wrong_key(manifest, {**_NEEDED, **_NAMED}):
        return f"{MANIFEST} has no valid {key!r}"
    if checkpoint_number(checkpoint) != manifest["update"]:
        return f"{MANIFEST} is that of update {manifest['update']}"
    return _wrong_file(checkpoint, manifest) or _wrong_archive(checkpoint, manifest)


def universal_folder(checkpoint: Path) -> Path:
    """Where a checkpoint is kept once it is converted for any world size."""
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
    """torch.save writes zip archives: one whose pages were lost to a power cut most often lacks its begin or end."""
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
