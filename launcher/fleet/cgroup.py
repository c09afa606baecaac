"""The memory that the node's ranks may take: the machine's, or what a control group of Linux leaves them of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class Memory:
    """Bytes in use of those that there are, where the bound is the lowest."""

    used_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class _Names:
    """The files of a control group, in the kernel's first or second version of them."""

    limit: str
    used: str
    reclaimable: str
    events: str


_V1 = _Names("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", "memory.oom_control")
_V2 = _Names("memory.max", "memory.current", "inactive_file", "memory.events")


class ControlGroup:
    """The memory group that this process, and so its ranks, belong to.

    Formats: the kernel's Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst.
    """

    def __init__(self, own: Path = Path("/proc/self/cgroup"), mounts: Path = Path("/sys/fs/cgroup")) -> None:
        self._names, root, path = _membership(own, mounts)
        self._folders = list(_upwards(root, path))

    def memory(self) -> Memory:
        """The lowest bound of the machine, the group and the groups that it lies in."""
        machine = psutil.virtual_memory()
        bounds = [Memory(machine.total - machine.available, machine.total)]
        bounds += [bound for folder in self._folders if (bound := self._bound(folder)) is not None]
        return min(bounds, key=lambda bound: bound.total_bytes)

    def oom_kills(self) -> int | None:
        """How many processes of the group the kernel has killed for want of memory; None where it does not count."""
        return _field(self._folders[0] / self._names.events, "oom_kill") if self._folders else None

    def _bound(self, folder: Path) -> Memory | None:
        """None where there is none ("max")."""
        limit, used = _number(folder / self._names.limit), _number(folder / self._names.used)
        if limit is None or used is None:
            return None
        # Files that were read stay in memory, and count as used, until something else needs the room.
        reclaimable = _field(folder / "memory.stat", self._names.reclaimable) or 0
        return Memory(max(0, used - reclaimable), limit)


def _membership(own: Path, mounts: Path) -> tuple[_Names, Path, str]:
    """How the group's files are named, where groups are mounted, and the group's path there."""
    for line in _text(own).splitlines():
        _, _, controllers_and_path = line.partition(":")
        controllers, _, path = controllers_and_path.partition(":")
        if "memory" in controllers.split(","):
            return _V1, mounts / "memory", path
    path = next((line.removeprefix("0::") for line in _text(own).splitlines() if line.startswith("0::")), "/")
    return _V2, mounts, path


def _upwards(root: Path, path: str) -> Iterator[Path]:
    """The group's folder and those that it lies in. Inside a container they may be mounted without those above."""
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
    """The number behind a name in a file of names and numbers."""
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
