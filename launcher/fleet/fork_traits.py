"""What a process passes on to its children, and whether a fork of another process can have the same."""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts")
_LIMITS = tuple(sorted((name, getattr(resource, name)) for name in dir(resource) if name.startswith("RLIMIT_")))
_OOM_SCORE = Path("/proc/self/oom_score_adj")
_OF_RANKS = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK", "LAUNCHER_"),
    # Read when a process group or the first CUDA context is made.
    *("MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME", "NCCL_", "CUDA_VISIBLE_DEVICES", "TORCH_FR_", "TORCH_NCCL_"),
)
_OF_RAY = ("RAY_", "SPT_NOENV", "PYTHONBREAKPOINT")
_OF_SHELLS = (
    *("_", "PWD", "OLDPWD", "SHLVL", "TERM", "COLORTERM", "LINES", "COLUMNS", "LS_COLORS", "WINDOWID", "DISPLAY"),
    *("TMUX", "STY", "SSH_", "XDG_SESSION_", "DBUS_SESSION_BUS_ADDRESS"),
    *("INVOCATION_ID", "JOURNAL_STREAM", "SYSTEMD_EXEC_PID"),
)
_READ_LATE = frozenset((*_OF_RANKS, *_OF_RAY, *_OF_SHELLS))
"""Variables, and with a final underscore prefixes of them, that may differ: nothing reads them during the imports."""


@dataclass(frozen=True)
class Traits:
    """What a process passes on to its children, besides its environment.

    `fixed` must be equal in two processes: where they run, as whom, and their hard limits. A child may have larger
    values of `raisable` than its parent: the niceness, and how much the kernel's OOM killer prefers it.
    """

    fixed: Mapping[str, str]
    raisable: Mapping[str, int]

    @classmethod
    def here(cls) -> Traits:
        """That of this process."""
        namespaces = {f"{name} namespace": _link(Path("/proc/self/ns", name)) for name in _NAMESPACES}
        hard = {f"hard limit {name}": str(resource.getrlimit(number)[1]) for name, number in _LIMITS}
        fixed = {
            "machine": _text("/proc/sys/kernel/random/boot_id"),
            "user": f"{os.getuid()}:{os.getgid()}",
            "Python": sys.executable,
            "processors": str(sorted(os.sched_getaffinity(0))),
            "control group": _text("/proc/self/cgroup"),
        }
        raisable = {"niceness": os.getpriority(os.PRIO_PROCESS, 0), "oom_score_adj": _oom_score()}
        return cls({**fixed, **namespaces, **hard}, raisable)

    def differences(self, wanted: Traits) -> list[str]:
        """The names of what a fork of a process with these traits cannot have as one with the traits `wanted` has."""
        names = [name for name in {**self.fixed, **wanted.fixed} if self.fixed.get(name) != wanted.fixed.get(name)]
        return names + [name for name, value in self.raisable.items() if wanted.raisable.get(name, 0) < value]


def differing_variables(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """The names of variables that the imports may have read, and whose values differ."""
    names = sorted(name for name in {**one, **other} if one.get(name) != other.get(name))
    return [name for name in names if not _read_late(name)]


def passed_on() -> dict[str, Any]:
    """What a child would inherit from this thread, as far as `take_on` can give it to a fork of another process."""
    status = _text("/proc/self/status").splitlines()
    umask = next((line.split()[1] for line in status if line.startswith("Umask:")), "0077")
    return {
        "folder": str(Path.cwd()),
        "blocked": [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, ())],
        "limits": {name: list(resource.getrlimit(number)) for name, number in _LIMITS},
        "umask": int(umask, 8),
        "niceness": os.getpriority(os.PRIO_PROCESS, 0),
        "oom_score_adj": _oom_score(),
    }


def take_on(found: Mapping[str, Any]) -> None:
    """Makes this process as a child of the one that sent the result of `passed_on`. Raises OSError or ValueError."""
    for name, number in _LIMITS:
        resource.setrlimit(number, tuple(found["limits"][name]))
    if found["oom_score_adj"] != _oom_score():
        _OOM_SCORE.write_text(str(found["oom_score_adj"]))
    os.setpriority(os.PRIO_PROCESS, 0, found["niceness"])
    os.umask(found["umask"])
    os.chdir(found["folder"])
    signal.pthread_sigmask(signal.SIG_SETMASK, found["blocked"])


def _oom_score() -> int:
    """How much the kernel's OOM killer prefers this process, from -1000 to 1000."""
    return int(_text(str(_OOM_SCORE)) or "0")


def _read_late(name: str) -> bool:
    prefixes = tuple(known for known in _READ_LATE if known.endswith("_") and known != "_")
    return name in _READ_LATE or name.startswith(prefixes)


def _link(path: Path) -> str:
    try:
        return str(path.readlink())
    except OSError:
        return ""


def _text(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
