"""`launcher doctor`: check the nodes that a job would run on."""

from __future__ import annotations

from pathlib import Path

from launcher.cli.options import JOB_FILE, OVERRIDES
from launcher.job import load_job
from launcher.runs.doctor import examine_job


def doctor(job_file: Path = JOB_FILE, overrides: list[str] = OVERRIDES) -> None:
    """Place a job's nodes and check them as a run does before its ranks start. Trains nothing.

    Versions, clocks, the run directory's storage, free space, GPUs, and a small all-reduce over the network.
    Exit status 1 if a node is unfit.
    """
    examine_job(load_job(job_file, *(overrides or ())))
