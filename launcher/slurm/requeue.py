"""Requeuing the Slurm job of this process without some of its nodes."""

from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Collection, Iterable, Sequence

from launcher.fleet.process import signals_blocked

_SECONDS = 60.0
_EXCLUDED = re.compile(r"\bExcNodeList=(\S+)")
_PLAIN_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def slurm_names(hosts: Iterable[str]) -> list[str]:
    """The names under which Slurm knows hosts, which may have reported a longer name of their own."""
    return [host.partition(".")[0] for host in hosts if _PLAIN_HOST.fullmatch(host)]


def excluded_of(hosts: Sequence[str], excluded: Collection[str]) -> list[str]:
    """Those of an allocation's hosts that are excluded from the run."""
    return [host for host in hosts if host.partition(".")[0] in slurm_names(excluded)]


def requeue_without(job_id: str, hosts: Collection[str]) -> str | None:
    """Requeues the job, which ends all its processes, and makes Slurm leave out the hosts when it starts again.

    Returns None, or the message of scontrol if Slurm does not requeue the job.
    """
    # Slurm changes the nodes of a pending job only, and the requeued job is pending while its processes still end.
    # These get SIGTERM at once, then SIGKILL after KillWait, by default 30 s.
    with signals_blocked(signal.SIGTERM, signal.SIGCONT):
        try:
            before = _scontrol("show", "job", job_id)
            _scontrol("requeue", job_id)
            given = [name for name in _EXCLUDED.findall(before) if name != "(null)"]
            _scontrol("update", f"JobId={job_id}", f"ExcNodeList={','.join([*given, *slurm_names(hosts)])}")
        except (OSError, subprocess.SubprocessError) as error:
            return getattr(error, "stderr", None) or str(error)
    return None


def _scontrol(*arguments: str) -> str:
    command = ["scontrol", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=_SECONDS).stdout
