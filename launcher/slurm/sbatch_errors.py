"""Explains Slurm's answers: why sbatch rejected a job, and the state of a job."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from typing import Literal

JobStatus = Literal["waiting", "running", "finished", "failed", "stopped", "unknown"]

STATES: dict[str, JobStatus] = {
    "PENDING": "waiting",
    "CONFIGURING": "waiting",
    "REQUEUED": "waiting",
    "REQUEUE_FED": "waiting",
    "REQUEUE_HOLD": "waiting",
    "RESV_DEL_HOLD": "waiting",
    "SPECIAL_EXIT": "waiting",
    "RUNNING": "running",
    "COMPLETING": "running",
    "RESIZING": "running",
    "SIGNALING": "running",
    "STAGE_OUT": "running",
    "STOPPED": "running",
    "SUSPENDED": "running",
    "COMPLETED": "finished",
    "BOOT_FAIL": "failed",
    "FAILED": "failed",
    "LAUNCH_FAILED": "failed",
    "NODE_FAIL": "failed",
    "OUT_OF_MEMORY": "failed",
    "RECONFIG_FAIL": "failed",
    "CANCELLED": "stopped",
    "DEADLINE": "stopped",
    "PREEMPTED": "stopped",
    "REVOKED": "stopped",
    "TIMEOUT": "stopped",
}
"""Slurm's job states (squeue(1), sacct(1)) → the launcher's."""


def job_status(state: str) -> JobStatus:
    """The status for a state of Slurm, also for sacct's `CANCELLED by 1000` and truncated `CANCELLED+`."""
    return STATES.get(state.split(" ")[0].rstrip("+"), "unknown") if state else "unknown"


@dataclass(frozen=True)
class SbatchError:
    """Why sbatch failed. `in_job`: the job must be fixed; then with its key and a hint if they are known."""

    in_job: bool
    key: str | None = None
    hint: str | None = None


_UNREACHABLE = ("Unable to contact slurm controller", "Socket timed out", "Could not establish a configuration source")

_REASONS = {
    "invalid partition": ("slurm.partition", "sinfo --summarize lists the partitions"),
    "not permitted to use this partition": ("slurm.partition", "sinfo --summarize lists the partitions"),
    "No partition specified": ("slurm.partition", "sinfo --summarize lists the partitions"),
    "Invalid account": ("slurm.account", "sacctmgr show associations user=$USER lists yours"),
    "Invalid qos": ("slurm.qos", "sacctmgr show qos lists them"),
    "Invalid generic resource": ("cluster.gpus_per_node", "sinfo --format='%n %G' lists what the nodes have"),
    "time limit": ("slurm.time", "sinfo --format='%P %l' lists the limits"),
    "dependency": ("slurm.dependency", "squeue --me lists your jobs"),
    "Invalid feature": ("slurm.constraint", "sinfo --format='%n %f' lists the features"),
    "reservation": ("slurm.reservation", "scontrol show reservation lists them"),
    "Invalid node name": ("slurm.nodelist", "sinfo --Node lists the nodes"),
    "job array": ("slurm.array", "scontrol show config names the largest index, MaxArraySize"),
    "Memory": ("slurm.mem", "sinfo --format='%n %m' lists what the nodes have"),
    "CPU count": ("slurm.cpus_per_task", "sinfo --format='%n %c' lists what the nodes have"),
    "More processors requested": ("slurm.cpus_per_task", "sinfo --format='%n %c' lists what the nodes have"),
    "Node count": ("cluster.nodes", "sinfo --summarize lists the partitions with their nodes"),
    "node configuration is not available": (
        None,
        "no node has all that the job requests: sinfo --format='%n %c %m %G' lists processors, memory and GPUs",
    ),
}
"""Text of sbatch → the job's key, and a command that shows valid values."""


def explain_sbatch_error(message: str) -> SbatchError:
    """Explains an error message of sbatch."""
    if any(words in message for words in _UNREACHABLE):
        return SbatchError(in_job=False)
    for words, (key, hint) in _REASONS.items():
        if words.lower() in message.lower():
            return SbatchError(True, key, hint)
    return SbatchError(True)


def query_status(job_id: str, cluster: str | None) -> str | None:
    """The job's status from squeue, such as `waiting (Dependency)`; None if squeue does not report it."""
    clusters = [f"--clusters={cluster}"] if cluster else []
    argv = ["squeue", "--noheader", f"--jobs={job_id}", "--format=%T|%r", *clusters]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = [line for line in done.stdout.splitlines() if "|" in line]
    if done.returncode != 0 or not lines:
        return None
    state, _, reason = lines[0].partition("|")
    status = job_status(state)
    return f"{status} ({reason})" if status == "waiting" and reason != "None" else status
