"""State and cancellation of a job in Slurm's queue."""

from __future__ import annotations

import subprocess

from launcher.errors import RunFailed


def slurm_job_state(job_id: str) -> str | None:
    """Slurm's state of a job ("PENDING", "RUNNING"); None if it is not in the queue or Slurm is not installed."""
    return _queried(job_id, "%T")


def ends_by_time_limit(job_id: str) -> bool:
    """Whether Slurm is ending a job because of its time limit; False if this is not known."""
    return _queried(job_id, "%r") == "TimeLimit"


def slurm_job_hosts(job_id: str) -> str | None:
    """The host list of a running job, such as "gpu[2-3]"; None if this is not known."""
    return _queried(job_id, "%N")


def requeue_slurm_job(job_id: str) -> None:
    """Queues a running Slurm job again. Raises RunFailed with the message of scontrol."""
    try:
        done = subprocess.run(["scontrol", "requeue", job_id], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise RunFailed("scontrol is not installed here") from None
    if done.returncode != 0:
        raise RunFailed(f"scontrol requeue {job_id}: {done.stderr.strip() or f'status {done.returncode}'}")


def _queried(job_id: str, field: str) -> str | None:
    command = ["squeue", "--noheader", "--jobs", job_id, "--format", field]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return next(iter(done.stdout.split()), None) if done.returncode == 0 else None


def cancel_slurm_job(job_id: str) -> None:
    """Cancels a Slurm job, or a step such as 77.0, which ends all its processes. Raises RunFailed, quoting scancel."""
    try:
        done = subprocess.run(["scancel", "--", job_id], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise RunFailed(f"scancel is not installed here; run this on a node with Slurm: scancel {job_id}") from None
    if done.returncode != 0:
        raise RunFailed(f"scancel {job_id}: {done.stderr.strip() or f'status {done.returncode}'}")
