"""Making a plan: reads what the job names, measures what must be measured, and resolves it all."""

from __future__ import annotations

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
    find_model_folder(job.model.name_or_path, job.model.gguf_file)
    find_data(job.data.train, "data.train")
    if isinstance(job.data.eval, str | list):
        find_data(job.data.eval, "data.eval")
    return user, machine


def load_ds_config(job: Job, job_file: str) -> DsConfig:
    """The DeepSpeed JSON that the job names or holds. Raises RequestError."""
    if isinstance(job.deepspeed, dict):
        return from_mapping(job.deepspeed, f"{job_file}: deepspeed")
    path = Path(job.deepspeed).expanduser()
    if path.is_file():
        return read_ds_config(path)
    if job.deepspeed in preset_names():
        return read_ds_config(shipped_folder("ds_configs") / f"{job.deepspeed}.json")
    match = nearest(job.deepspeed, preset_names())
    raise RequestError(
        Problem(
            f"there is no file {job.deepspeed} (looked from {Path.cwd()})",
            file=job_file,
            key="deepspeed",
            mend=f"did you mean the preset {match}?" if match else f"presets: {', '.join(preset_names())}",
        )
    )
