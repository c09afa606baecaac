"""Cancelling a job at its scheduler, where its run does not answer."""

from __future__ import annotations

import subprocess

from launcher.errors import RunFailed


def cancel_slurm_job(job_id: str) -> None:
    """Cancels a Slurm job: all its processes end. Raises RunFailed with what scancel says."""
    try:
        done = subprocess.run(["scancel", "--", job_id], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise RunFailed(f"scancel is not installed here; where Slurm is: scancel {job_id}") from None
    if done.returncode != 0:
        raise RunFailed(f"scancel {job_id}: {done.stderr.strip() or f'status {done.returncode}'}")
