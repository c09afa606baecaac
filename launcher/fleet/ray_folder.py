"""The private temporary folder of a Ray that the launcher starts; removed later if its owner was killed.

Ray makes its own folder readable and writable by everybody (mode 0777). It is therefore inside a folder that only this
user may enter. The token is there too, where nobody else can replace it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
import stat
import tempfile
from pathlib import Path

import psutil

_PARENT, _PREFIX = Path("/tmp"), "lr-"
_OWNER = "owner.json"


class RayFolder:
    """A folder of this process, mode 0700, locked while the process runs.

    Its name is short: it contains Ray's sockets, whose paths may have at most 107 bytes.
    """

    def __init__(self, parent: Path = _PARENT) -> None:
        remove_abandoned(parent)
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        self.token = self.path / "token"
        self._lock = _locked_owner_file(self.path)

    @property
    def ray(self) -> Path:
        """The folder for Ray, which creates it with mode 0777."""
        return self.path / "r"

    def remove(self) -> None:
        """Removes the folder and its contents."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def remove_abandoned(parent: Path = _PARENT) -> None:
    """Removes the folders of this user's launchers that ended without removing them, as after kill -9.

    A lock decides, not the process id: the kernel releases the lock when its holder ends, also for other containers
    that share /tmp, where process ids differ.
    """
    for folder in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            if _is_own_folder(folder):
                _remove_if_abandoned(folder)


def _is_own_folder(folder: Path) -> bool:
    found = folder.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()


def _remove_if_abandoned(folder: Path) -> None:
    """Raises OSError if the owner holds the lock, or if there is no owner file: the folder is just being made."""
    owner = os.open(folder / _OWNER, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(owner)


def _locked_owner_file(folder: Path) -> int | None:
    """Writes and locks the owner file, which people may read. It gets its final name once it is locked.

    Returns None if the file system has no locks: then other processes do not remove the folder.
    """
    process = psutil.Process()
    record = {"host": socket.gethostname(), "pid": process.pid, "started": process.create_time()}
    new = folder / f"{_OWNER}.new"
    file = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.write(file, json.dumps(record).encode())
        fcntl.flock(file, fcntl.LOCK_EX)
        new.rename(folder / _OWNER)
    except OSError:
        os.close(file)
        return None
    return file
