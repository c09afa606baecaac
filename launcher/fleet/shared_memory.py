"""The shared memory of ranks, in /dev/shm: removing what killed ranks leave there, and the free space."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

FOLDER = Path("/dev/shm")
_OTHER_NAMES = re.compile(r"nccl-|torch_(?P<pid>\d+)_")
# The time of a file is that of the kernel's last tick.
_TICK_SECONDS = 0.1
# The children of a killed rank may end a moment after it.
_RELEASE_SECONDS = 1.0


def remove_segments(started: float, ranks: range, rendezvous: Mapping[str, str]) -> list[str]:
    """Removes the segments of ranks that have ended. Returns their names.

    `started` is the time at which the ranks were started, in seconds since the epoch; `rendezvous` has their
    MASTER_ADDR and MASTER_PORT, which DeepSpeed puts into its names. Those of NCCL and torch do not name a run: a
    segment is removed if it is this user's, not older than the ranks, and neither mapped nor open in any process.
    """
    own = _deepspeed_names(ranks, rendezvous)
    deadline = time.monotonic() + _RELEASE_SECONDS
    removed: list[str] = []
    while found := _segments(started, own):
        used = _used()
        for segment in found:
            if segment.name not in used:
                segment.unlink(missing_ok=True)
                removed.append(segment.name)
        if not own & used or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    return sorted(removed)


def free_space() -> tuple[int, int]:
    """The free and the total bytes of /dev/shm; (0, 0) if it does not exist."""
    with suppress(OSError):
        usage = shutil.disk_usage(FOLDER)
        return usage.free, usage.total
    return 0, 0


def _deepspeed_names(ranks: range, rendezvous: Mapping[str, str]) -> set[str]:
    """The names that `shm_initialize` of DeepSpeed's csrc/cpu/comm/shm.cpp gives the buffers of these ranks."""
    where = f"{rendezvous.get('MASTER_ADDR')}_{rendezvous.get('MASTER_PORT')}"
    return {f"deepspeed_allreduce_buffer_{os.getuid()}_{where}_{rank}" for rank in ranks}


def _segments(started: float, names: set[str]) -> list[Path]:
    """The segments with these names, and those of NCCL and of processes with torch that have ended."""
    found = []
    with suppress(OSError):
        for entry in os.scandir(FOLDER):
            other = _OTHER_NAMES.match(entry.name)
            if entry.name not in names and (other is None or _alive(other["pid"])):
                continue
            with suppress(FileNotFoundError):
                facts = entry.stat(follow_symlinks=False)
                created = min(facts.st_mtime, facts.st_ctime)
                if facts.st_uid == os.getuid() and created >= started - _TICK_SECONDS:
                    found.append(Path(entry.path))
    return found


def _alive(pid: str | None) -> bool:
    return pid is not None and Path("/proc", pid).exists()


def _used() -> set[str]:
    """The names of the segments that a live process maps or has open."""
    return {
        Path(path.removesuffix(" (deleted)")).name
        for process in Path("/proc").glob("[0-9]*")
        for path in _files_of(process)
        if path.startswith(f"{FOLDER}/")
    }


def _files_of(process: Path) -> Iterator[str]:
    # The processes of other users cannot be read, nor have they this user's segments.
    with suppress(OSError):
        for line in (process / "maps").read_text(errors="replace").splitlines():
            if len(fields := line.split(maxsplit=5)) == 6:
                yield fields[5]
    with suppress(OSError):
        for file in (process / "fd").iterdir():
            with suppress(OSError):
                yield str(file.readlink())
