"""Ray's temporary folder: private, kept while its owner runs, removed after the owner has ended."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.fleet.ray_folder import RayFolder, remove_abandoned

OWNER = """
import sys, time
from pathlib import Path
from launcher.fleet.ray_folder import RayFolder
folder = RayFolder(Path(sys.argv[1]))
folder.ray.mkdir(mode=0o777)
folder.token.write_text("secret")
print(folder.path, flush=True)
time.sleep(600)
"""


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Another process that owns a folder in tmp_path, and the folder."""
    with subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process, Path(process.stdout.readline().strip())
        process.kill()


def test_a_folder_is_private_and_removed_by_its_owner(tmp_path: Path) -> None:
    folder = RayFolder(tmp_path)
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    assert folder.token.parent == folder.path and folder.ray.parent == folder.path
    folder.ray.mkdir()
    remove_abandoned(tmp_path)
    assert folder.ray.is_dir(), "its owner is running"
    folder.remove()
    assert list(tmp_path.iterdir()) == []


def test_the_paths_of_rays_sockets_are_short_enough() -> None:
    folder = RayFolder()
    try:
        longest = f"{folder.ray}/session_2026-11-25_14-12-05_575123_4194304/sockets/plasma_store.99"
        assert len(longest) <= 107
    finally:
        folder.remove()


def test_the_next_owner_removes_the_folder_of_a_killed_one(
    tmp_path: Path, owner: tuple[subprocess.Popen[str], Path]
) -> None:
    process, left = owner
    with_owner_alive = RayFolder(tmp_path)
    assert (left / "token").is_file(), "a running owner keeps its folder"
    process.send_signal(signal.SIGKILL)
    process.wait()
    new = RayFolder(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([with_owner_alive.path, new.path])


def test_only_abandoned_folders_of_this_user_are_removed(
    tmp_path: Path, owner: tuple[subprocess.Popen[str], Path]
) -> None:
    process, left = owner
    process.kill()
    process.wait()
    elsewhere = tmp_path / "elsewhere"
    shutil.move(left, elsewhere)
    (tmp_path / "lr-link").symlink_to(elsewhere)
    (tmp_path / "lr-new").mkdir()
    (tmp_path / "lr-file").touch()
    linked = tmp_path / "lr-owner"
    linked.mkdir()
    (linked / "owner.json").symlink_to(elsewhere / "owner.json")
    remove_abandoned(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"elsewhere", "lr-link", "lr-new", "lr-file", "lr-owner"}
    assert (elsewhere / "token").is_file()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")
def test_another_users_folder_is_kept(tmp_path: Path, owner: tuple[subprocess.Popen[str], Path]) -> None:
    process, left = owner
    process.kill()
    process.wait()
    os.chown(left, 12345, 12345)
    remove_abandoned(tmp_path)
    assert left.is_dir()
    os.chown(left, 0, 0)
    remove_abandoned(tmp_path)
    assert not left.exists()
