"""`launcher doctor`: check the nodes that a job would run on."""

from __future__ import annotations

from pathlib import Path

from launcher.cli.options import JOB_FILE, OVERRIDES
from launcher.job import load_job
from launcher.runs.doctor import examine_job


def doctor(job_file: Path = JOB_FILE, overrides: list[str] = OVERRIDES) -> None:
    """Run the checks that a run makes on its nodes before the ranks start. Trains nothing.

    They cover package versions, clocks, the run directory's storage, free disk space, GPUs and the network. Unless the
    job sets cluster.health_checks=off, they include the full health checks: errors and clocks of GPUs, a known product
    of matrices on each device, and the speed of devices, network and disk. Exit status 1 if a node is unfit.
    """
    examine_job(load_job(job_file, *(overrides or ())))
