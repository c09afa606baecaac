"""The memory available to the node's ranks: the machine's, or the limit of a Linux control group."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class Memory:
    """Bytes in use and in total, of the lowest limit."""

    used_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class _Names:
    """File names of a memory control group, version 1 or 2."""

    limit: str
    used: str
    reclaimable: str
    events: str


_V1 = _Names("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", "memory.oom_control")
_V2 = _Names("memory.max", "memory.current", "inactive_file", "memory.events")


class ControlGroup:
    """The memory control group of this process and its ranks.

    Formats: the kernel's Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst.
    """

    def __init__(self, own: Path = Path("/proc/self/cgroup"), mounts: Path = Path("/sys/fs/cgroup")) -> None:
        self._names, root, path = _membership(own, mounts)
        self._folders = list(_upwards(root, path))

    def memory(self) -> Memory:
        """The lowest limit of the machine, the group and its parent groups."""
        machine = psutil.virtual_memory()
        limits = [Memory(machine.total - machine.available, machine.total)]
        limits += [limit for folder in self._folders if (limit := self._limit_of(folder)) is not None]
        return min(limits, key=lambda limit: limit.total_bytes)

    def oom_kills(self) -> int | None:
        """How many processes of the group the kernel has killed for lack of memory; None if it does not count them."""
        return _field(self._folders[0] / self._names.events, "oom_kill") if self._folders else None

    def _limit_of(self, folder: Path) -> Memory | None:
        """The limit of one group; None if it has none ("max")."""
        limit, used = _number(folder / self._names.limit), _number(folder / self._names.used)
        if limit is None or used is None:
            return None
        # The page cache counts as used, but is released when memory is needed.
        reclaimable = _field(folder / "memory.stat", self._names.reclaimable) or 0
        return Memory(max(0, used - reclaimable), limit)


def _membership(own: Path, mounts: Path) -> tuple[_Names, Path, str]:
    """The names of the group's files, the folder where groups are mounted, and the group's path below it."""
    for line in _text(own).splitlines():
        _, _, controllers_and_path = line.partition(":")
        controllers, _, path = controllers_and_path.partition(":")
        if "memory" in controllers.split(","):
            return _V1, mounts / "memory", path
    path = next((line.removeprefix("0::") for line in _text(own).splitlines() if line.startswith("0::")), "/")
    return _V2, mounts, path


def _upwards(root: Path, path: str) -> Iterator[Path]:
    """The group's folder and its parents. Inside a container only some of them may be mounted."""
    folder = root / path.lstrip("/")
    for each in (folder, *folder.parents):
        if not each.is_relative_to(root):
            return
        if each.is_dir():
            yield each


def _number(file: Path) -> int | None:
    text = _text(file).strip()
    return int(text) if text.isdecimal() else None


def _field(file: Path, name: str) -> int | None:
    """The number of a name in a file with a name and a number on each line."""
    for line in _text(file).splitlines():
        key, _, value = line.partition(" ")
        if key == name and value.isdecimal():
            return int(value)
    return None


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
