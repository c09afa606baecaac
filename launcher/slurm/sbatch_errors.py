"""What Slurm answers, in our words: why it refuses a job, and where one stands."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from typing import Literal

Standing = Literal["waiting", "running", "finished", "failed", "stopped", "unknown"]

STATES: dict[str, Standing] = {
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
"""Slurm's states of a job (squeue(1), sacct(1)) and what they are to us."""


def standing(state: str) -> Standing:
    """Where a job stands that Slurm says this of; sacct's `CANCELLED by 1000` and cut-off `CANCELLED+` as well."""
    return STATES.get(state.split(" ")[0].rstrip("+"), "unknown") if state else "unknown"


@dataclass(frozen=True)
class Refusal:
    """Why sbatch took no job: `ours` where the request is to be fixed, with the job's key and the hint."""

    ours: bool
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
        "no node has all that is asked for: sinfo --format='%n %c %m %G' lists processors, memory and GPUs",
    ),
}
"""What sbatch says → the job's key, and how to see what would be right."""


def refusal(told: str) -> Refusal:
    """What is to be fixed where sbatch failed with these words."""
    if any(words in told for words in _UNREACHABLE):
        return Refusal(ours=False)
    for words, (key, hint) in _REASONS.items():
        if words.lower() in told.lower():
            return Refusal(True, key, hint)
    return Refusal(True)


def where_it_stands(job_id: str, cluster: str | None) -> str | None:
    """Where the job stands now, as squeue says it, such as `waiting (Dependency)`; None where it does not say."""
    place = [f"--clusters={cluster}"] if cluster else []
    argv = ["squeue", "--noheader", f"--jobs={job_id}", "--format=%T|%r", *place]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = [line for line in done.stdout.splitlines() if "|" in line]
    if done.returncode != 0 or not lines:
        return None
    state, _, reason = lines[0].partition("|")
    told = standing(state)
    return f"{told} ({reason})" if told == "waiting" and reason != "None" else told
