"""The temporary folder of a Ray that the launcher starts: private, and removed later where its owner was killed.

Ray makes its own folder readable and writable by everybody (mode 0777). So it gets one below a folder that only this
user may enter, and the token is beside it, where nobody else can replace it.
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
    """A folder of this process, mode 0700, locked for as long as the process lives.

    Names are short: Ray's sockets are in here, and the path of a socket may have 107 bytes at most.
    """

    def __init__(self, parent: Path = _PARENT) -> None:
        remove_abandoned(parent)
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        self.token = self.path / "token"
        self._lock = _locked_owner_file(self.path)

    @property
    def ray(self) -> Path:
        """What Ray is given as its own folder. Ray makes it, with mode 0777."""
        return self.path / "r"

    def remove(self) -> None:
        """Removes the folder and all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def remove_abandoned(parent: Path = _PARENT) -> None:
    """Removes the folders of this user's launchers that ended without doing so themselves, as after kill -9.

    A lock decides, not the process id: the kernel releases it with its holder, and it is also seen from another
    container that has the same /tmp, where process ids mean other processes.
    """
    for folder in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            if _is_own_folder(folder):
                _remove_if_abandoned(folder)


def _is_own_folder(folder: Path) -> bool:
    found = folder.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()


def _remove_if_abandoned(folder: Path) -> None:
    """Raises OSError if its owner holds the lock, and if it has no owner file: it is being made at this moment."""
    owner = os.open(folder / _OWNER, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(owner)


def _locked_owner_file(folder: Path) -> int | None:
    """Who owns the folder, for people to read. The file appears under its name once it is locked.

    None where the file system has no locks: then the folder is left alone by others.
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
