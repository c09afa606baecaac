"""The lock of a run directory: one launcher at a time, also if file locks are not visible on other hosts.

The running launcher holds an flock on the file, writes its identity into it, and touches it every few seconds. If the
flock is refused, the lock is taken. If it is granted, this proves nothing (Lustre and some NFS mounts lock within one
host only), so the file's last holder is checked: on this host by its process, on another host by its heartbeat.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from launcher.files import read_json, utc_now, write_whole

BEAT_SECONDS = 5.0
STALE_SECONDS = 60.0
"""A launcher on another host with an older heartbeat has ended."""
_RETRY_SECONDS, _RETRIES = 0.1, 10
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


@dataclass(frozen=True)
class Holder:
    """The launcher that holds a lock. `started` is its process's start time in clock ticks since the host's boot."""

    host: str
    boot: str
    pid: int
    started: int
    slurm_job: str
    slurm_restart: str
    time: str
    token: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.time}"


@contextlib.contextmanager
def hold(path: Path) -> Iterator[bool]:
    """Holds the lock file at `path` inside the block; yields False if another launcher holds it.

    Only the file's owner may open it, so no other user can lock it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        with contextlib.suppress(PermissionError):
            os.fchmod(descriptor, 0o600)
        if not (_flock(descriptor) and _take(path, descriptor)):
            yield False
            return
        ended = threading.Event()
        heartbeat = threading.Thread(target=_send_heartbeats, args=(descriptor, ended), name="lock", daemon=True)
        heartbeat.start()
        try:
            yield True
        finally:
            ended.set()
            heartbeat.join()
            # The empty file has no holder. It is not removed: a new file could be locked at the same time as this one.
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def read_holder(path: Path) -> Holder | None:
    """The launcher that last wrote the lock file and did not release it; None if the file is missing or unreadable."""
    try:
        found = read_json(path)
    except OSError:
        return None
    if found is None:
        return None
    kinds = {field.name: int if field.name in ("pid", "started") else str for field in fields(Holder)}
    if any(type(found.get(name)) is not kind for name, kind in kinds.items()):
        return None
    return Holder(**{name: found[name] for name in kinds})


def is_alive(holder: Holder, path: Path) -> bool:
    """Whether the launcher that wrote the lock file at `path` is still running.

    On this host its process is checked, on another host its heartbeat, measured with the file system's clock.
    """
    if (holder.host, holder.boot) == (socket.gethostname(), _boot()):
        return _started(holder.pid) == holder.started
    job = os.environ.get("SLURM_JOB_ID")
    if job and job == holder.slurm_job and os.environ.get("SLURM_RESTART_COUNT", "0") != holder.slurm_restart:
        return False  # Slurm requeues a job only after it has ended it
    age = heartbeat_age(path)
    return age is not None and age < STALE_SECONDS


def heartbeat_age(path: Path) -> float | None:
    """Seconds since the lock file was touched, by the file system's clock; None if the file is missing."""
    try:
        # When a file is opened, a network file system gets its times from the server.
        with path.open("rb") as file:
            touched = os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return None
    return max(0.0, _file_system_time(path.parent) - touched)


def _file_system_time(folder: Path) -> float:
    """The file system's time, from a file written now; this host's time if none can be written."""
    probe = folder / f".{uuid.uuid4().hex[:8]}.now"
    try:
        probe.touch(mode=0o600)
        return probe.stat().st_mtime
    except OSError:
        return time.time()
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)


def _flock(descriptor: int) -> bool:
    """Takes the flock; True also if the file system has none. Retries: `launcher status` takes it for a moment."""
    for attempt in range(_RETRIES):
        if attempt:
            time.sleep(_RETRY_SECONDS)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        return True
    return False


def _take(path: Path, descriptor: int) -> bool:
    """Writes this process into the lock file unless its holder is alive. Only one launcher at a time does this."""
    claim = path.with_name(f".{path.name}.claim")
    if not _create_claim(claim):
        return False
    try:
        holder = read_holder(path)
        if holder is not None and is_alive(holder, path):
            return False
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        write_whole(descriptor, json.dumps(asdict(_this_process())).encode())
        os.fsync(descriptor)
        return True
    finally:
        claim.unlink(missing_ok=True)


def _create_claim(claim: Path) -> bool:
    """Creates a file that only one launcher can create, on any file system; a stale one from a crash is replaced."""
    for _ in range(2):
        try:
            os.close(os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        except FileExistsError:
            age = heartbeat_age(claim)
            if age is not None and age < STALE_SECONDS:
                return False
            claim.unlink(missing_ok=True)
        else:
            return True
    return False


def _send_heartbeats(descriptor: int, ended: threading.Event) -> None:
    while not ended.wait(BEAT_SECONDS):
        with contextlib.suppress(OSError):
            os.utime(descriptor)


def _this_process() -> Holder:
    return Holder(
        host=socket.gethostname(),
        boot=_boot(),
        pid=os.getpid(),
        started=_started(os.getpid()) or 0,
        slurm_job=os.environ.get("SLURM_JOB_ID", ""),
        slurm_restart=os.environ.get("SLURM_RESTART_COUNT", "0"),
        time=utc_now(),
        token=uuid.uuid4().hex,
    )


def _boot() -> str:
    """The id of this host's current boot."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _started(pid: int) -> int | None:
    """The start time of a process on this host in clock ticks since boot; None if it is not running or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return None if fields[0] == b"Z" else int(fields[19])
    except (OSError, IndexError, ValueError):
        return None
