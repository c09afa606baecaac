"""The manifest of a checkpoint: every file with its size and checksum, also those of several ranks."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from launcher.manifest import (
    MANIFEST,
    checkpoint_fault,
    checkpoint_is_complete,
    file_records,
    files_in,
    merged_records,
    read_manifest,
    write_manifest,
)
from launcher.version import __version__

FACTS: dict[str, Any] = {"update": 3, "samples": 24, "world_size": 2, "plan_sha256": "0" * 64}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "update-3"
    (folder / "offloaded_tensors/rank00").mkdir(parents=True)
    (folder / "model").write_text("abc")
    (folder / "offloaded_tensors/rank00/states.swp").write_bytes(bytes(5_000_000))
    return folder


def changed(folder: Path, **keys: object) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, **keys}))


def test_each_file_has_its_size_and_checksum(folder: Path) -> None:
    write_manifest(folder, **FACTS)
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["format"] == 2
    assert {key: manifest[key] for key in FACTS} == FACTS
    assert manifest["versions"]["launcher"] == __version__
    assert {"deepspeed", "torch", "transformers"} <= set(manifest["versions"])
    assert manifest["files"] == {
        "model": {"size": 3, "sha256": hashlib.sha256(b"abc").hexdigest()},
        "offloaded_tensors/rank00/states.swp": {
            "size": 5_000_000,
            "sha256": hashlib.sha256(bytes(5_000_000)).hexdigest(),
        },
    }
    assert checkpoint_is_complete(folder) and checkpoint_fault(folder) is None


def test_only_the_given_files_are_listed(folder: Path) -> None:
    of_ranks = [file_records(folder, ["model"]), file_records(folder, [])]
    write_manifest(folder, merged_records(of_ranks), **FACTS)
    manifest = read_manifest(folder)
    assert manifest is not None and list(manifest["files"]) == ["model"]


def test_two_ranks_with_the_same_file_are_an_error(folder: Path) -> None:
    files = file_records(folder, ["model"])
    with pytest.raises(ValueError, match="rank 1 and a rank before it both wrote model"):
        merged_records([files, files])


def test_a_link_counts_as_a_file(folder: Path, tmp_path: Path) -> None:
    (folder / "link").symlink_to("model")
    (folder / "folder").symlink_to(tmp_path)
    (folder / "broken").symlink_to("nowhere")
    assert files_in(folder) == ["broken", "folder", "link", "model", "offloaded_tensors/rank00/states.swp"]


def test_a_manifest_without_a_format_has_sizes_only(folder: Path) -> None:
    old = {**FACTS, "time": "2026-01-01T00:00:00.000Z", "files": {"model": 3}}
    (folder / MANIFEST).write_text(json.dumps(old))
    assert checkpoint_is_complete(folder) and checkpoint_fault(folder) is None
    (folder / "model").write_text("ab")
    assert checkpoint_fault(folder) == "model has 2 bytes instead of 3"


@pytest.mark.parametrize("format", [1, 3, "2", None, True])
def test_another_format_is_not_read(folder: Path, format: object) -> None:
    write_manifest(folder, **FACTS)
    changed(folder, format=format)
    assert read_manifest(folder) is None
    assert checkpoint_fault(folder) == "manifest.json has no valid 'format'"


@pytest.mark.parametrize(
    "files",
    [
        {"model": 3},
        {"model": {"size": 3}},
        {"model": {"size": "3", "sha256": "0" * 64}},
        {"model": {"size": 3, "sha256": "0" * 63}},
        {"../model": {"size": 3, "sha256": "0" * 64}},
        {"/etc/passwd": {"size": 3, "sha256": "0" * 64}},
    ],
)
def test_an_invalid_list_of_files_is_rejected(folder: Path, files: object) -> None:
    write_manifest(folder, **FACTS)
    changed(folder, files=files)
    assert read_manifest(folder) is None
    assert checkpoint_fault(folder) == "manifest.json has no valid 'files'"
