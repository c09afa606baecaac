"""Cancelling a job at its scheduler, where its run does not answer."""

from __future__ import annotations

import subprocess

from launcher.errors import RunFailed


def slurm_job_state(job_id: str) -> str | None:
    """What Slurm says of a job that it still has ("PENDING", "RUNNING"); None where it has none, or is not here."""
    command = ["squeue", "--noheader", "--jobs", job_id, "--format", "%T"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return next(iter(done.stdout.split()), None) if done.returncode == 0 else None


def cancel_slurm_job(job_id: str) -> None:
    """Cancels a Slurm job: all its processes end. Raises RunFailed with what scancel says."""
    try:
        done = subprocess.run(["scancel", "--", job_id], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise RunFailed(f"scancel is not installed here; where Slurm is: scancel {job_id}") from None
    if done.returncode != 0:
        raise RunFailed(f"scancel {job_id}: {done.stderr.strip() or f'status {done.returncode}'}")
