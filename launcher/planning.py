"""Making a plan: reads what the job names, measures what must be measured, and resolves it all."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import IO

from launcher.ds_config import DsConfig, from_mapping, read_ds_config
from launcher.errors import Problem, RequestError, nearest
from launcher.job import Job
from launcher.plan.facts import MachineFacts
from launcher.plan.model import Plan
from launcher.plan.resolve import check_request, resolve
from launcher.prepare import prepare
from launcher.prepare.machine import measure_machine
from launcher.prepare.sources import find_data, find_model_folder
from launcher.presets import preset_names, shipped_folder

OnProgress = Callable[[dict[str, object]], None]


def make_plan(job: Job, job_file: str, on_progress: OnProgress, log: IO[bytes] | int = subprocess.DEVNULL) -> Plan:
    """The plan of `job`. Raises RequestError; what needs neither model nor data is told at once."""
    user, machine = check_job(job, job_file)
    prepared = prepare(job, on_progress, log)
    return resolve(job, user, prepared.model, prepared.data, machine)


def check_job(job: Job, job_file: str) -> tuple[DsConfig, MachineFacts]:
    """The job's DeepSpeed JSON and this machine. Raises RequestError for what can be told without model and data."""
    user, machine = load_ds_config(job, job_file), measure_machine()
    check_request(job, user, machine)
    _check_folder(job.output_dir, "output_dir", job_file)
    if job.data.cache_dir is not None:
        _check_folder(job.data.cache_dir, "data.cache_dir", job_file)
    find_model_folder(job.model.name_or_path, job.model.gguf_file)
    find_data(job.data.train, "data.train")
    if isinstance(job.data.eval, str | list):
        find_data(job.data.eval, "data.eval")
    return user, machine


def _check_folder(name: str, key: str, job_file: str) -> None:
    """Can something be written at `name`, which need not be there yet?"""
    path = Path(name).expanduser().absolute()
    there = next(part for part in (path, *path.parents) if part.exists())
    if not there.is_dir():
        raise RequestError(Problem(f"{there} is a file; a folder is needed", file=job_file, key=key))
    if not os.access(there, os.W_OK | os.X_OK):
        raise RequestError(Problem(f"{there} may not be written to", file=job_file, key=key))


def load_ds_config(job: Job, job_file: str) -> DsConfig:
    """The DeepSpeed JSON that the job names or holds. Raises RequestError."""
    if isinstance(job.deepspeed, dict):
        return from_mapping(job.deepspeed, f"{job_file}: deepspeed")
    path = Path(job.deepspeed).expanduser()
    if path.is_file():
        return read_ds_config(path)
    if job.deepspeed in preset_names():
        return read_ds_config(shipped_folder("ds_configs") / f"{job.deepspeed}.json")
    match = nearest(path.stem, preset_names())
    raise RequestError(
        Problem(
            f"there is no file {job.deepspeed} (looked from {Path.cwd()})",
            file=job_file,
            key="deepspeed",
            mend=f"did you mean the preset {match}?" if match else f"presets: {', '.join(preset_names())}",
        )
    )
